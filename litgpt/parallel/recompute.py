"""Activation recomputation: parts of a model run again in the backward pass, in exchange for memory."""

from collections.abc import Iterator
from functools import partial, wraps
from itertools import groupby, islice
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from litgpt.errors import UserError
from litgpt.model.config import Config
from litgpt.model.gpt import GPT, Block
from litgpt.model.surgery import Function, wrap_forward
from litgpt.parallel.offload import HostOffload
from litgpt.recipe.recompute import RecomputeArgs

# The methods of each part, as attribute paths in a block.
RECOMPUTED = {"core_attention": ["attention.core_attention"], "mlp": ["mlp.forward"], "moe": ["mlp.forward"]}
DISCARDED = {
    "norms": [f"{norm}.forward" for norm in ("norm_1", "norm_2", "norm_1_post", "norm_2_post")],
    "activation": ["mlp.gating", "mlp.activation", "mlp.shared.gating", "mlp.experts.gating"],
    "expert_activation": ["mlp.experts.gating"],
    "up_projection": ["attention.project_qkv"],
}
"""Parts whose outputs are not saved either, but recomputed for the functions that save them."""


def apply_recompute(model: GPT, settings: RecomputeArgs, *, compiled: bool) -> None:
    """Apply activation recomputation and offloading, after a model is split, and before it is compiled and sharded.

    Args:
        compiled: whether blocks will be compiled; the compiler then decides what small operations save.

    Raises:
        UserError: if `recompute.modules` names a part that the model does not have.
    """
    tower_blocks = list_trained_tower_blocks(model)
    if settings.granularity == "full":
        for block in tower_blocks:
            wrap_forward(block, recompute_function)
    if settings.granularity == "full" and settings.method == "uniform" and settings.num_layers > 1:
        recompute_block_groups(model, settings.num_layers)
    elif settings.granularity == "full":
        size = settings.num_layers if settings.method == "block" else None
        for is_local, stage in groupby(model.blocks, lambda block: isinstance(block, Block)):
            for block in islice(stage, size) if is_local else ():
                wrap_forward(block, recompute_function)
    elif settings.granularity == "selective":
        check_recompute_parts(model.config, settings.parts)
        for block in model.local_blocks:
            recompute_parts(block, settings, compiled=compiled)
    if settings.offload and settings.granularity != "selective":
        for block in (*model.local_blocks, *tower_blocks):
            wrap_forward(block, partial(use_saved_tensor_hooks, HostOffload(block)))


def list_trained_tower_blocks(model: GPT) -> list[nn.Module]:
    """The blocks that run of the towers that are trained; others save nothing for backward."""
    towers = (tower for tower in model.towers if tower.is_trained)
    return [block for tower in towers for block in tower.blocks[: tower.shape.blocks_run]]


def recompute_function(function: Function) -> Function:
    """A function that saves only its arguments, and runs again in backward with the same random numbers."""
    return wraps(function)(partial(checkpoint, function, use_reentrant=False))


def recompute_block_groups(model: GPT, size: int) -> None:
    """Recompute `size` blocks at a time, so that only the inputs of the first one are saved."""

    def run_in_groups(run_blocks: Function) -> Function:
        run_group = recompute_function(run_blocks)

        def wrapped(layers: range, x_BTD: Tensor, *args: Any) -> Tensor:
            added = x_BTD.shape[-1] // model.config.n_embd - 1  # features of images, after as many of the first layers
            start = max(size, added)
            x_BTD = run_group(layers[:start], x_BTD, *args)
            for first in range(start, len(layers), size):
                x_BTD = run_group(layers[first : first + size], x_BTD, *args)
            return x_BTD

        return wrapped

    wrap_forward(model, run_in_groups, "run_blocks")
    for block in model.prediction_blocks:
        wrap_forward(block, recompute_function)


def check_recompute_parts(config: Config, parts: set[str]) -> None:
    """Check that the whole model has these parts; a pipeline stage may lack some of them.

    Raises:
        UserError: naming the part, and one that the model has.
    """
    experts = [config.has_experts(layer) for layer in range(config.n_layer)]
    missing = {
        "mlp": (all(experts), "moe"),
        "moe": (not any(experts), "mlp"),
        "expert_activation": (not any(experts), "activation"),
        "up_projection": (not config.latent_attention, "core_attention"),
    }
    for part in sorted(parts & missing.keys()):
        is_missing, other = missing[part]
        if is_missing:
            raise UserError(f"recompute.modules: {part}: this model has none; use {other}")


def recompute_parts(block: Block, settings: RecomputeArgs, *, compiled: bool) -> None:
    """Recompute the parts of a block that the settings name."""
    offload = HostOffload(block) if settings.offload else None
    outputs = DiscardedOutputs(offload)
    for part in sorted(settings.parts):
        if part not in ("mlp", "moe") or (part == "mlp") == (block.experts is None):
            for module, name in find_methods(block, RECOMPUTED.get(part, [])):
                wrap_forward(module, recompute_function, name)
            for module, name in find_methods(block, DISCARDED.get(part, [])):
                wrap_forward(module, recompute_function if compiled else outputs.discard, name)
    if not compiled and (settings.parts & DISCARDED.keys() or offload is not None):
        wrap_forward(block, partial(use_saved_tensor_hooks, outputs))


def find_methods(block: nn.Module, paths: list[str]) -> Iterator[tuple[nn.Module, str]]:
    """The modules and names of those methods that a block has."""
    for path in paths:
        *parents, name = path.split(".")
        module: Any = block
        for parent in parents:
            module = getattr(module, parent, None)
        if module is not None and not isinstance(module, nn.Identity) and hasattr(module, name):
            yield module, name


def use_saved_tensor_hooks(hooks: "HostOffload | DiscardedOutputs", function: Function) -> Function:
    """A function whose saved tensors go through hooks, as in `torch.autograd.graph.saved_tensors_hooks`."""

    @wraps(function)
    def hooked(*args: Any, **kwargs: Any) -> Any:
        hooks.begin()
        with saved_tensors_hooks(hooks.pack, hooks.unpack):
            return function(*args, **kwargs)

    return hooked


class _SaveOutputs(torch.autograd.Function):
    """Identity that saves its inputs for backward, so that recomputation computes them again."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*tensors)
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(_ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        return grads


class RecomputedOutputs:
    """The outputs of one part: recomputed when first needed, and freed after all functions that saved one have read it.

    Args:
        node: the autograd node of `_SaveOutputs`.
    """

    def __init__(self, node: Any) -> None:
        self.node = node
        self.saved = self.remaining = 0
        self.values: tuple[Tensor, ...] | None = None

    def get_output(self, index: int) -> Tensor:
        """The output of this index."""
        if self.values is None:
            self.values, self.remaining = self.node.saved_tensors, self.saved
        value = self.values[index]
        self.remaining -= 1
        if not self.remaining:
            self.values = None
        return value


class OutputView(NamedTuple):
    """A tensor that shares its memory with a recomputed output: shape, strides and offset."""

    outputs: RecomputedOutputs
    position: int
    layout: tuple[Any, ...]


class DiscardedOutputs:
    """Hooks that save a block's activations, except outputs that some of its parts can recompute.

    Args:
        offload: hooks for the other activations, if they are saved in host memory.
    """

    def __init__(self, offload: HostOffload | None) -> None:
        self.offload = offload
        self.outputs: dict[int, tuple[StorageWeakRef, RecomputedOutputs, int]] = {}

    def begin(self) -> None:
        """Forget the outputs of the last forward pass."""
        self.outputs = {}
        if self.offload is not None:
            self.offload.begin()

    def discard(self, function: Function) -> Function:
        """A function that is recomputed, also for the functions that save its outputs."""

        def save_outputs(*args: Any) -> tuple[Tensor, ...]:
            outputs = function(*args)
            return _SaveOutputs.apply(*(outputs if isinstance(outputs, tuple) else (outputs,)))

        recomputed = recompute_function(save_outputs)

        @wraps(function)
        def wrapped(*args: Any) -> Any:
            outputs = recomputed(*args)
            if outputs[0].grad_fn is not None:
                self._record(outputs)
            return outputs if len(outputs) > 1 else outputs[0]

        return wrapped

    def _record(self, tensors: tuple[Tensor, ...]) -> None:
        outputs = RecomputedOutputs(tensors[0].grad_fn)
        for index, tensor in enumerate(tensors):
            storage = StorageWeakRef(tensor.untyped_storage())
            self.outputs[storage.cdata] = (storage, outputs, index)

    def pack(self, tensor: Tensor) -> Any:
        """What to save in place of a tensor."""
        storage, outputs, index = self.outputs.get(tensor.untyped_storage()._cdata, (None, None, 0))
        if storage is None or outputs is None or storage.expired():
            return tensor if self.offload is None else self.offload.pack(tensor)
        outputs.saved += 1
        return OutputView(outputs, index, (tensor.shape, tensor.stride(), tensor.storage_offset()))

    def unpack(self, packed: Any) -> Tensor:
        """The tensor, from what `pack` returned for it."""
        if isinstance(packed, OutputView):
            return packed.outputs.get_output(packed.position).as_strided(*packed.layout)
        return packed if self.offload is None else self.offload.unpack(packed)
