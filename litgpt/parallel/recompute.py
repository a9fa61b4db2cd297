"""Parts of a model that backward computes again, or finds in host memory, instead of on the device."""

from collections.abc import Callable, Iterator
from functools import partial, wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from litgpt.errors import UserError
from litgpt.model.surgery import Function, wrap_forward
from litgpt.parallel.offload import HostOffload, use_saved_tensor_hooks
from litgpt.recipe.recompute import RecomputeArgs

# where each part is: the attribute paths in a block that it may have
RECOMPUTED = {"core_attention": ["attention.core_attention"], "mlp": ["mlp.forward"], "moe": ["mlp.forward"]}
DISCARDED = {
    "norms": [f"{norm}.forward" for norm in ("norm_1", "norm_2", "norm_1_post", "norm_2_post")],
    "activation": ["mlp.gating", "mlp.activation", "mlp.shared.gating", "mlp.experts.gating"],
    "expert_activation": ["mlp.experts.gating"],
    "up_projection": ["attention.project_qkv"],
}


def apply_recompute(model: nn.Module, settings: RecomputeArgs, *, compiled: bool) -> None:
    """Let a model compute again what the settings say; before it is compiled and sharded, after it is split.

    Args:
        model: has `blocks` and `run_blocks`.
        compiled: blocks will be; what to keep of small operations is then the compiler's choice.

    Raises:
        UserError: if the model has no part of a kind that is named.
    """
    stages = group_local_blocks(model)
    blocks = [block for stage in stages for block in stage]
    again = checkpoint_function
    if settings.granularity == "full" and settings.method == "uniform" and settings.num_layers > 1:
        recompute_block_groups(model, settings.num_layers, again)
    elif settings.granularity == "full":
        first = settings.num_layers if settings.method == "block" else len(blocks)
        for block in (block for stage in stages for block in stage[:first]):
            wrap_forward(block, again)
    elif settings.granularity == "selective":
        check_recompute_parts(model, settings.parts)
        for block in blocks:
            recompute_parts(block, settings, again, compiled=compiled)
    if settings.offload and settings.granularity != "selective":
        for block in blocks:
            wrap_forward(block, partial(use_saved_tensor_hooks, HostOffload(block)))


def group_local_blocks(model: nn.Module) -> list[list[nn.Module]]:
    """The blocks that lie here, those of each run of neighbours by themselves."""
    stages: list[list[nn.Module]] = [[]]
    for block in model.blocks:  # type: ignore[union-attr]
        if hasattr(block, "attention"):
            stages[-1].append(block)
        else:  # it lies in another process
            stages.append([])
    return stages


def checkpoint_function(function: Function) -> Function:
    """A function of which only the arguments are kept for backward; random numbers are drawn as they were."""
    return wraps(function)(partial(checkpoint, function, use_reentrant=False))


def recompute_block_groups(model: nn.Module, size: int, again: Callable[[Function], Function]) -> None:
    """Compute `size` blocks again in one go, so that only what enters the first of them is kept."""

    def by_groups(run_blocks: Function) -> Function:
        group = again(run_blocks)

        def run(layers: range, x_BTD: Tensor, *rest: Any) -> Tensor:
            for first in range(0, len(layers), size):
                x_BTD = group(layers[first : first + size], x_BTD, *rest)
            return x_BTD

        return run

    wrap_forward(model, by_groups, "run_blocks")


def check_recompute_parts(model: nn.Module, parts: set[str]) -> None:
    """Refuse parts that the whole model has not; a stage of it alone may lack some."""
    config: Any = model.config
    experts = [config.has_experts(layer) for layer in range(config.n_layer)]
    lacking = {
        "mlp": (all(experts), "moe"),
        "moe": (not any(experts), "mlp"),
        "expert_activation": (not any(experts), "activation"),
        "up_projection": (not config.latent_attention, "core_attention"),
    }
    for part in sorted(parts & lacking.keys()):
        lacks, other = lacking[part]
        if lacks:
            raise UserError(f"recompute.modules: {part}: this model has none; {other} would do")


def recompute_parts(
    block: nn.Module, settings: RecomputeArgs, again: Callable[[Function], Function], *, compiled: bool
) -> None:
    """Let a block compute the parts again that the settings name."""
    host = HostOffload(block) if settings.offload else None
    results = DiscardedOutputs(host)
    dense = block.experts is None
    for part in sorted(settings.parts):
        if part not in ("mlp", "moe") or (part == "mlp") == dense:
            for owner, name in find_methods(block, RECOMPUTED.get(part, [])):
                wrap_forward(owner, again, name)
            for owner, name in find_methods(block, DISCARDED.get(part, [])):
                wrap_forward(owner, again if compiled else partial(results.discarded, again=again), name)
    if not compiled and (settings.parts & DISCARDED.keys() or host is not None):
        wrap_forward(block, partial(use_saved_tensor_hooks, results))


def find_methods(block: nn.Module, paths: list[str]) -> Iterator[tuple[nn.Module, str]]:
    """The modules and names of those attributes that a block has."""
    for path in paths:
        *owners, name = path.split(".")
        owner: Any = block
        for step in owners:
            owner = getattr(owner, step, None)
        if owner is not None and not isinstance(owner, nn.Identity) and hasattr(owner, name):
            yield owner, name


class _SaveOutputs(torch.autograd.Function):
    """Identity that keeps what passes for backward: in what is computed again, that is then made once more."""

    @staticmethod
    def forward(context: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        context.save_for_backward(*tensors)
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(context: Any, *slopes: Tensor) -> tuple[Tensor, ...]:
        return slopes


class RecomputedOutputs:
    """The results of one part; made again for the first that asks, and kept until all that saved one have asked."""

    def __init__(self, node: Any) -> None:
        self.node = node
        self.saved = self.left = 0
        self.values: tuple[Tensor, ...] | None = None

    def made(self, number: int) -> Tensor:
        """The result of this number."""
        if self.values is None:
            self.values, self.left = self.node.saved_tensors, self.saved
        value = self.values[number]
        self.left -= 1
        if not self.left:
            self.values = None
        return value


class OutputView(NamedTuple):
    """A tensor that shares its memory with a result."""

    result: RecomputedOutputs
    number: int
    layout: tuple[Any, ...]


class DiscardedOutputs:
    """Keeps a block's activations, but not those that some of its parts can make again."""

    def __init__(self, rest: HostOffload | None) -> None:
        self.rest = rest
        self.known: dict[int, tuple[StorageWeakRef, RecomputedOutputs, int]] = {}

    def begin(self) -> None:
        """Forget the results of the last forward pass."""
        self.known = {}
        if self.rest is not None:
            self.rest.begin()

    def discarded(self, function: Function, *, again: Callable[[Function], Function]) -> Function:
        """A function that is computed again, and whose results are made again for those that keep them."""

        def passed(*arguments: Any) -> tuple[Tensor, ...]:
            results = function(*arguments)
            return _SaveOutputs.apply(*(results if isinstance(results, tuple) else (results,)))

        repeated = again(passed)

        @wraps(function)
        def noted(*arguments: Any) -> Any:
            results = repeated(*arguments)
            if results[0].grad_fn is not None:
                self._note(results)
            return results if len(results) > 1 else results[0]

        return noted

    def _note(self, results: tuple[Tensor, ...]) -> None:
        result = RecomputedOutputs(results[0].grad_fn)
        for index, tensor in enumerate(results):
            memory = StorageWeakRef(tensor.untyped_storage())
            self.known[memory.cdata] = (memory, result, index)

    def pack(self, tensor: Tensor) -> Any:
        """What to keep for a tensor."""
        memory, result, index = self.known.get(tensor.untyped_storage()._cdata, (None, None, 0))
        if memory is None or result is None or memory.expired():
            return tensor if self.rest is None else self.rest.pack(tensor)
        result.saved += 1
        return OutputView(result, index, (tensor.shape, tensor.stride(), tensor.storage_offset()))

    def unpack(self, kept: Any) -> Tensor:
        """The tensor for what was kept."""
        if isinstance(kept, OutputView):
            return kept.result.made(kept.number).as_strided(*kept.layout)
        return kept if self.rest is None else self.rest.unpack(kept)
