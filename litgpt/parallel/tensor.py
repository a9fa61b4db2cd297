"""Tensor parallelism: every matrix of a layer is split over ranks, and between layers so are the tokens.

Parameters are DTensors; what computes is their local part, which `localize` puts in their place while a module runs.
A block's layers run as they are, on the heads and inner widths that lie here (Shoeybi et al. 2019, section 3); around
attention and feed-forward tokens are gathered, and sums over ranks scattered again (Korthikanti et al. 2022, section
4.2.2), or, without `sequence`, only summed.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor

from litgpt.errors import UserError
from litgpt.model.config import Config
from litgpt.model.gpt import GPT
from litgpt.model.surgery import Function, wrap_forward
from litgpt.parallel.collectives import Group, all_gather, all_reduce, copy_to_group, reduce_scatter
from litgpt.parallel.mesh import Mesh
from litgpt.parallel.token_sharding import VocabularyShard
from litgpt.recipe.parallel import ParallelArgs

TensorFunction = Callable[[Tensor], Tensor]

SPLIT_KINDS = {
    **dict.fromkeys(("embedding", "head", "attention.q", "attention.q_up", "attention.kv_up"), "columns"),
    **dict.fromkeys(("attention.k", "attention.v"), "groups"),
    **dict.fromkeys(("mlp.gate", "mlp.up", "shared.gate", "shared.up"), "columns"),
    **dict.fromkeys(("attention.out", "mlp.down", "shared.down"), "rows"),
    "attention": "columns",
}
"""How each layer is split: its outputs (columns; groups are those of key-value heads) or its inputs (rows).

Others have all of their parameters on every rank, and see a part of the tokens or of the heads.
"""

COLUMNS = dict.fromkeys(
    ("weight", "bias", "sinks", "lora_b", "lora_b_first", "lora_magnitude", "scale_out", "shift"), 0
)
SPLIT_DIMS: dict[str, dict[str, int]] = {
    "columns": COLUMNS,
    "groups": COLUMNS,
    "rows": {"weight": 1, "lora_a": 1, "lora_a_first": 1, "scale_in": 0},
}
"""The dim along which a parameter of such a layer is split."""
REPLICATED = {
    "columns": ("lora_a", "lora_a_first", "scale_in"),
    "groups": ("lora_a", "lora_a_first", "scale_in"),
    "rows": ("lora_b", "lora_b_first", "scale_out"),
}
"""Parameters of such a layer that are whole on every rank."""
RANK_ZERO_ONLY = ("bias", "shift")
"""Parameters of a layer split by rows that one rank alone adds."""


@dataclass(frozen=True)
class LocalLayout:
    """How a parameter lies on the ranks of an axis, and what computes of it.

    Attributes:
        placements: of its DTensor.
        grad_placements: how its gradient comes out of a rank's own tokens or heads; None for as it lies.
        cut: what a rank takes of what lies here.
    """

    placements: tuple[Placement, ...]
    grad_placements: tuple[Placement, ...] | None = None
    cut: TensorFunction | None = None

    def to_local(self, parameter: Tensor) -> Tensor:
        """What computes of a parameter."""
        assert isinstance(parameter, DTensor)
        local = parameter.to_local(grad_placements=self.grad_placements)
        return local if self.cut is None else self.cut(local)


def use_local_params(module: nn.Module, layouts: dict[Any, dict[str, LocalLayout]]) -> None:
    """Let modules compute with their local parameters whenever `module` runs."""

    def use_local(forward: Function) -> Function:
        def wrapped(*arguments: Any, **named: Any) -> Any:
            kept = [(owner, key, owner._parameters[key]) for owner, keys in layouts.items() for key in keys]
            for owner, key, parameter in kept:
                if isinstance(parameter, DTensor):
                    owner._parameters[key] = layouts[owner][key].to_local(parameter)
            try:
                return forward(*arguments, **named)
            finally:
                for owner, key, parameter in kept:
                    owner._parameters[key] = parameter

        return wrapped

    wrap_forward(module, use_local)


def communicate(module: Any, *, before: TensorFunction | None = None, after: TensorFunction | None = None) -> None:
    """Pass a module's first input through `before`, and its output through `after`."""

    def wrap(forward: Function) -> Function:
        def wrapped(x: Tensor, *arguments: Any, **named: Any) -> Tensor:
            y = forward(x if before is None else before(x), *arguments, **named)
            return y if after is None else after(y)

        return wrapped

    wrap_forward(module, wrap)


def distribute_parameter(module: nn.Module, key: str, mesh: DeviceMesh, layout: LocalLayout) -> None:
    """Make a parameter, which may be on the meta device, a DTensor that lies as told."""
    parameter = module._parameters[key]
    assert parameter is not None
    whole = distribute_tensor(parameter.detach(), mesh, layout.placements, src_data_rank=None)
    module._parameters[key] = nn.Parameter(whole, requires_grad=parameter.requires_grad)


def apply_tensor_parallel(model: GPT, config: Config, mesh: Mesh, settings: ParallelArgs) -> VocabularyShard:
    """Split a model over the tensor axis; experts apart, which are split by themselves.

    Returns:
        what this rank has of the vocabulary.

    Raises:
        UserError: if heads or widths do not go round, or a tuner has no split.
    """
    axis, ranks = mesh.storage["tensor"], mesh.dims.tensor
    check_tensor_sizes(config, ranks)
    if not settings.sequence and config.n_expert:
        raise UserError("parallel.sequence: false would send every token to its experts several times; set true")
    group = mesh.group("tensor")
    plan = dict(plan_layouts(model, config, axis, sequence=settings.sequence))
    for module, keys in plan.items():
        for key, layout in keys.items():
            distribute_parameter(module, key, axis, layout)
    slice_quantized_weights(model, config, axis)
    ends = {owner: plan.pop(owner) for owner in (model.embedding, model.head) if owner in plan}
    for module, keys in plan.items():
        use_local_params(module, {module: keys})
    add_communication(model, group, sequence=settings.sequence)
    use_local_params(model, ends)  # the model itself reads the matrix of the output
    return VocabularyShard(group, (config.padded_vocab_size or 0) // ranks)


def check_tensor_sizes(config: Config, ranks: int) -> None:
    """Refuse a number of ranks that does not divide what is split."""
    sizes = {
        "n_head": config.n_head,
        "padded_vocab_size": config.padded_vocab_size,
        "intermediate_size": config.intermediate_size,
        "shared expert width": config.shared_size or 0,
    }
    for name, size in sizes.items():
        if size is not None and size % ranks:
            would_do = max(degree for degree in range(1, ranks + 1) if size % degree == 0)
            raise UserError(f"parallel.tensor: {ranks} does not divide the model's {name}: {size}; set {would_do}")
    groups = config.n_query_groups or config.n_head
    if not config.latent_attention and groups % ranks and ranks % groups:
        raise UserError(
            f"parallel.tensor: {ranks} and the model's n_query_groups: {groups} do not divide each other; "
            f"set parallel.tensor: {groups}"
        )


def plan_layouts(
    model: GPT, config: Config, axis: DeviceMesh, *, sequence: bool
) -> Iterator[tuple[nn.Module, dict[str, LocalLayout]]]:
    """Every module with parameters of its own, save experts, and how each of these lies."""
    for name, module in model.named_modules():
        keys = [key for key, parameter in module._parameters.items() if parameter is not None]
        if keys and not name.endswith(".experts"):
            yield module, {key: plan_parameter(name, key, module, config, axis, sequence=sequence) for key in keys}


def plan_parameter(
    name: str, key: str, module: nn.Module, config: Config, axis: DeviceMesh, *, sequence: bool
) -> LocalLayout:
    """How a parameter of the module of this name lies."""
    kind = find_split_kind(name)
    key = key.removesuffix("_trained")
    if name.endswith((".norm_q", ".norm_k")) and config.norm_qk_type == "per_head" and config.norm_qk:
        kind = "columns" if name.endswith(".norm_q") else "groups"
    if kind is None:
        outside = not sequence and ".attention." not in name and ".mlp." not in name
        return LocalLayout((Replicate(),), None if outside else (Partial(),))
    if key in getattr(module, "quant_tensors", ()):
        return LocalLayout((Replicate(),))
    if key == "lora_magnitude" and kind == "rows":
        raise UserError("tuner.dora: true has no split for parallel.tensor: it norms whole rows; set dora: false")
    dim = SPLIT_DIMS[kind].get(key)
    if dim is None and key not in REPLICATED[kind] and not (kind == "rows" and key in RANK_ZERO_ONLY):
        raise UserError(f"tuner: {name}.{key} has no split for parallel.tensor; LoRA has, or set parallel.tensor: 1")
    if dim is None:
        once = kind == "rows" and key in RANK_ZERO_ONLY and axis.get_local_rank() > 0
        return LocalLayout((Replicate(),), (Partial(),), partial(torch.mul, other=0) if once else None)
    groups, ranks = config.n_query_groups or config.n_head, axis.size()
    if kind == "groups" and groups % ranks:
        return LocalLayout(
            (Replicate(),), (Partial(),), partial(slice_group, rank=axis.get_local_rank(), ranks=ranks, groups=groups)
        )
    return LocalLayout((Shard(dim),))


def slice_quantized_weights(model: GPT, config: Config, axis: DeviceMesh) -> None:
    """Let layers with packed weights, which lie whole on every rank, compute with this rank's part of them."""
    rank, ranks = axis.get_local_rank(), axis.size()
    groups = config.n_query_groups or config.n_head
    for name, module in model.named_modules():
        if hasattr(module, "quant_tensors") and (kind := find_split_kind(name)):
            if hasattr(module, "lora_magnitude"):
                raise UserError("tuner.dora: true is not for a packed base with parallel.tensor; set dora: false")
            if kind == "groups" and groups % ranks:
                module.slice_weight = partial(slice_group, rank=rank, ranks=ranks, groups=groups)
            else:
                module.slice_weight = partial(slice_local, group=axis.get_group(), dim=SPLIT_DIMS[kind]["weight"])


def find_split_kind(name: str) -> str | None:
    """How the layer of this name is split."""
    return next((SPLIT_KINDS[end] for end in SPLIT_KINDS if f".{name}".endswith(f".{end}")), None)


def slice_group(whole: Tensor, *, rank: int, ranks: int, groups: int) -> Tensor:
    """The rows of the one key-value head that this rank's queries read; several ranks have the same."""
    rows = whole.shape[0] // groups
    return whole.narrow(0, rank * groups // ranks * rows, rows)


def add_communication(model: GPT, group: Group, *, sequence: bool) -> None:
    """Exchange tokens before and after what is split."""
    join = partial(all_gather, group=group, dim=1) if sequence else partial(copy_to_group, group=group)
    part = partial(reduce_scatter, group=group, dim=1) if sequence else partial(all_reduce, group=group)
    blocks: list[Any] = model.local_blocks
    for block in blocks:
        communicate(block.attention, before=join, after=part)
        dense = block.mlp if block.experts is None else block.mlp.shared
        if dense is not None:
            communicate(dense, before=join, after=part)
        if getattr(block.attention, "norm_kind", None) == "olmo2":
            for one in (block.attention.norm_q, block.attention.norm_k):
                communicate(
                    one,
                    before=partial(all_gather, group=group, dim=-1),
                    after=partial(slice_local, group=group, dim=-1),
                )
    split_vocab_lookup(model.embedding, group, part)
    if model.position_embedding is not None and sequence:
        communicate(model.position_embedding, after=partial(slice_local, group=group, dim=-2))
    communicate(model.norm, after=join)


def slice_local(whole: Tensor, group: Group, dim: int) -> Tensor:
    """This rank's part along a dim."""
    return whole.chunk(dist.get_world_size(group), dim)[dist.get_rank(group)]


def split_vocab_lookup(embedding: Any, group: Group, reduce: TensorFunction) -> None:
    """Let an embedding, of which some rows lie here, look up those and add up with the others."""

    def split_lookup(forward: Function) -> Function:
        def wrapped(ids_BT: Tensor) -> Tensor:
            rows = len(embedding.weight)
            numbers = ids_BT - rows * dist.get_rank(group)
            is_local = (numbers >= 0) & (numbers < rows)
            return reduce(forward(numbers.clamp(0, rows - 1)) * is_local.unsqueeze(-1))

        return wrapped

    wrap_forward(embedding, split_lookup)
