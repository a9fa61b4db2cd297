"""Tensor parallelism: the matrices of every layer are split over ranks, and so are the tokens between layers.

Parameters are DTensors, which `use_local_params` replaces by their local tensors while a module runs. The layers of a
block run unchanged, on the heads and inner widths of this rank (Shoeybi et al. 2019, section 3). Tokens are
all-gathered before attention and feed-forward, and the outputs of all ranks reduce-scattered (sequence parallelism,
Korthikanti et al. 2022, section 4.2.2), or all-reduced without `sequence`. A tower is replicated: all ranks
encode all images.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor

from litgpt.errors import UserError
from litgpt.model.attention import Attention
from litgpt.model.config import Config
from litgpt.model.gpt import GPT
from litgpt.model.latent import LatentAttention
from litgpt.model.surgery import Function, wrap_forward
from litgpt.parallel.collectives import (
    all_gather,
    all_gather_replicated,
    all_reduce,
    copy_to_group,
    reduce_scatter,
    slice_local,
)
from litgpt.parallel.mesh import Mesh
from litgpt.parallel.model_sizes import check_tensor_sizes
from litgpt.parallel.token_sharding import VocabularyShard
from litgpt.recipe.parallel import ParallelArgs

SPLIT_KINDS = {
    **dict.fromkeys(("embedding", "head", "attention.q", "attention.q_up", "attention.kv_up"), "columns"),
    **dict.fromkeys(("attention.k", "attention.v"), "groups"),
    **dict.fromkeys(("mlp.gate", "mlp.up", "shared.gate", "shared.up"), "columns"),
    **dict.fromkeys(("attention.out", "mlp.down", "shared.down"), "rows"),
    "attention": "columns",
}
"""How each layer is split: along its outputs (columns; groups are those of key-value heads) or its inputs (rows).

The parameters of other layers are replicated; these layers run on some of the tokens or of the heads.
"""

COLUMNS = dict.fromkeys(
    ("weight", "bias", "sinks", "lora_b", "lora_b_first", "lora_magnitude", "scale_out", "shift"), 0
)
SPLIT_DIMS: dict[str, dict[str, int]] = {
    "columns": COLUMNS,
    "groups": COLUMNS,
    "rows": {"weight": 1, "lora_a": 1, "lora_a_first": 1, "scale_in": 0},
}
"""The dim along which each parameter of a layer of these kinds is split."""
REPLICATED = {
    "columns": ("lora_a", "lora_e", "lora_a_first", "scale_in"),
    "groups": ("lora_a", "lora_e", "lora_a_first", "scale_in"),
    "rows": ("lora_b", "lora_e", "lora_b_first", "scale_out"),
}
"""Parameters of a layer of these kinds that are replicated."""
RANK_ZERO_ONLY = ("bias", "shift")
"""Parameters of a layer split along rows that only the first rank adds."""


@dataclass(frozen=True)
class LocalLayout:
    """The layout of a parameter over an axis, and what a rank computes with.

    Attributes:
        placements: of the DTensor.
        grad_placements: of the gradient that a rank computes; None for `placements`.
        select: selects what the rank computes with from the local tensor; None for all of it.
    """

    placements: tuple[Placement, ...]
    grad_placements: tuple[Placement, ...] | None = None
    select: Function | None = None

    def to_local(self, parameter: Tensor) -> Tensor:
        """The tensor that this rank computes with."""
        assert isinstance(parameter, DTensor)
        local = parameter.to_local(grad_placements=self.grad_placements)
        return local if self.select is None else self.select(local)


def use_local_params(module: nn.Module, layouts: dict[nn.Module, dict[str, LocalLayout]]) -> None:
    """Replace parameters by their local tensors while the forward of `module` runs.

    Args:
        layouts: of the parameters of `module`, or of its submodules, by module and name.
    """

    def use_local(forward: Function) -> Function:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            parameters = [(owner, key, owner._parameters[key]) for owner, keys in layouts.items() for key in keys]
            for owner, key, parameter in parameters:
                if isinstance(parameter, DTensor):
                    owner._parameters[key] = layouts[owner][key].to_local(parameter)
            try:
                return forward(*args, **kwargs)
            finally:
                for owner, key, parameter in parameters:
                    owner._parameters[key] = parameter

        return wrapped

    wrap_forward(module, use_local)


def communicate(module: nn.Module, *, before: Function | None = None, after: Function | None = None) -> None:
    """Pass a module's first input through `before`, and its output through `after`."""

    def wrap(forward: Function) -> Function:
        def wrapped(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            y = forward(x if before is None else before(x), *args, **kwargs)
            return y if after is None else after(y)

        return wrapped

    wrap_forward(module, wrap)


def distribute_parameter(module: nn.Module, key: str, mesh: DeviceMesh, layout: LocalLayout) -> None:
    """Replace a parameter, which may be on the meta device, by a DTensor of this layout."""
    parameter = module._parameters[key]
    assert parameter is not None
    distributed = distribute_tensor(parameter.detach(), mesh, layout.placements, src_data_rank=None)
    module._parameters[key] = nn.Parameter(distributed, requires_grad=parameter.requires_grad)


def apply_tensor_parallel(model: GPT, mesh: Mesh, settings: ParallelArgs) -> VocabularyShard:
    """Split a model over the tensor axis, except its experts, which `apply_expert_parallel` splits.

    Returns:
        this rank's shard of the vocabulary.

    Raises:
        UserError: if heads or widths are not divisible, or a tuner is not supported.
    """
    config, axis, ranks = model.config, mesh.storage["tensor"], mesh.dims.tensor
    check_tensor_sizes(config, ranks, sequence=settings.sequence)
    group = mesh.group("tensor")
    plan = dict(plan_layouts(model, config, axis, sequence=settings.sequence))
    for module, keys in plan.items():
        for key, layout in keys.items():
            distribute_parameter(module, key, axis, layout)
    slice_quantized_weights(model, config, axis)
    ends: list[nn.Module] = [layer for layer in (model.embedding, model.head, model.score) if layer in plan]
    vocabulary = {layer: plan.pop(layer) for layer in ends}
    for module, keys in plan.items():
        use_local_params(module, {module: keys})
    for block in model.local_blocks:
        if isinstance(block.attention, LatentAttention):  # which reads this weight for cached tokens
            use_local_params(block.attention, {block.attention.kv_up: plan[block.attention.kv_up]})
    add_communication(model, group, sequence=settings.sequence)
    use_local_params(model, vocabulary)  # whose weights the model itself reads for its logits
    return VocabularyShard(group, (config.padded_vocab_size or 0) // ranks)


def plan_layouts(
    model: GPT, config: Config, axis: DeviceMesh, *, sequence: bool
) -> Iterator[tuple[nn.Module, dict[str, LocalLayout]]]:
    """Every module with parameters of its own, except experts, and the layout of each."""
    for name, module in model.named_modules():
        keys = [key for key, parameter in module._parameters.items() if parameter is not None]
        if keys and not name.endswith(".experts"):
            yield module, {key: plan_parameter(name, key, module, config, axis, sequence=sequence) for key in keys}


def plan_parameter(
    name: str, key: str, module: nn.Module, config: Config, axis: DeviceMesh, *, sequence: bool
) -> LocalLayout:
    """The layout of the parameter `key` of the module `name`."""
    kind = find_split_kind(name)
    key = key.removesuffix("_trained")
    has_head_norms = config.norm_qk and config.norm_qk_type.startswith("per_head")
    if name.endswith((".norm_q", ".norm_k")) and has_head_norms:
        kind = "columns" if name.endswith(".norm_q") else "groups"
    if name.split(".")[0] in ("score", "vision", "audio"):  # every rank computes it for all tokens, or all media
        return LocalLayout((Replicate(),))
    if kind is None:
        has_full_grad = not sequence and ".attention." not in name and ".mlp." not in name
        return LocalLayout((Replicate(),), None if has_full_grad else (Partial(),))
    if key in getattr(module, "quant_tensors", ()):
        return LocalLayout((Replicate(),))
    if key == "lora_magnitude" and kind == "rows":
        raise UserError(
            "tuner.dora: true is not supported with parallel.tensor: it normalizes whole rows; set tuner.dora: false"
        )
    dim = SPLIT_DIMS[kind].get(key)
    if dim is None and key not in REPLICATED[kind] and not (kind == "rows" and key in RANK_ZERO_ONLY):
        raise UserError(
            f"tuner: {name}.{key} is not supported with parallel.tensor; use LoRA, or set parallel.tensor: 1"
        )
    if dim is None:
        is_masked = kind == "rows" and key in RANK_ZERO_ONLY and axis.get_local_rank() > 0
        return LocalLayout((Replicate(),), (Partial(),), partial(torch.mul, other=0) if is_masked else None)
    groups, ranks = config.n_query_groups or config.n_head, axis.size()
    if kind == "groups" and groups % ranks:
        select = partial(slice_group, rank=axis.get_local_rank(), ranks=ranks, groups=groups)
        return LocalLayout((Replicate(),), (Partial(),), select)
    return LocalLayout((Shard(dim),))


def slice_quantized_weights(model: GPT, config: Config, axis: DeviceMesh) -> None:
    """Let quantized layers, which are replicated, compute with this rank's slice of their weights."""
    rank, ranks = axis.get_local_rank(), axis.size()
    groups = config.n_query_groups or config.n_head
    for name, module in model.named_modules():
        if hasattr(module, "quant_tensors") and (kind := find_split_kind(name)):
            if hasattr(module, "lora_magnitude"):
                raise UserError(
                    "tuner.dora: true is not supported with quantize and parallel.tensor; set tuner.dora: false"
                )
            if kind == "groups" and groups % ranks:
                module.slice_weight = partial(slice_group, rank=rank, ranks=ranks, groups=groups)
            else:
                module.slice_weight = partial(slice_local, group=axis.get_group(), dim=SPLIT_DIMS[kind]["weight"])


def find_split_kind(name: str) -> str | None:
    """How the layer of this name is split; None if it is not."""
    return next((SPLIT_KINDS[end] for end in SPLIT_KINDS if f".{name}".endswith(f".{end}")), None)


def slice_group(tensor: Tensor, *, rank: int, ranks: int, groups: int) -> Tensor:
    """The rows of the only key-value head that this rank's queries need; several ranks use the same one."""
    rows = tensor.shape[0] // groups
    return tensor.narrow(0, rank * groups // ranks * rows, rows)


def add_communication(model: GPT, group: ProcessGroup, *, sequence: bool) -> None:
    """Add the collectives before and after the split parts of the model."""
    gather = partial(all_gather, group=group, dim=1) if sequence else partial(copy_to_group, group=group)
    reduce = partial(reduce_scatter, group=group, dim=1) if sequence else partial(all_reduce, group=group)
    gather_width, slice_width = (partial(function, group=group, dim=-1) for function in (all_gather, slice_local))
    for block in model.local_blocks:
        communicate(block.attention, before=gather, after=reduce)
        dense = block.mlp if block.experts is None else block.mlp.shared
        if dense is not None:
            communicate(dense, before=gather, after=reduce)  # type: ignore[arg-type]
        if isinstance(block.attention, Attention) and block.attention.norm_kind == "olmo2":
            for norm in (block.attention.norm_q, block.attention.norm_k):
                communicate(norm, before=gather_width, after=slice_width)
    split_vocab_lookup(model.embedding, group, reduce)
    if sequence:
        wrap_forward(model.feature_places, partial(place_local_features, group=group))
    if model.position_embedding is not None and sequence:
        communicate(model.position_embedding, after=partial(slice_local, group=group, dim=-2))
    if model.score is None:
        communicate(model.head_input, after=gather)
    elif sequence:  # not split, so all ranks compute the same
        communicate(model.head_input, after=partial(all_gather_replicated, group=group, dim=1))


def split_vocab_lookup(embedding: nn.Embedding, group: ProcessGroup, reduce: Function) -> None:
    """Let an embedding look up the rows of this rank, and sum with the other ranks."""

    def split_lookup(forward: Function) -> Function:
        def wrapped(ids_BT: Tensor) -> Tensor:
            rows = len(embedding.weight)
            numbers = ids_BT - rows * dist.get_rank(group)
            is_local = (numbers >= 0) & (numbers < rows)
            return reduce(forward(numbers.clamp(0, rows - 1)) * is_local.unsqueeze(-1))

        return wrapped

    wrap_forward(embedding, split_lookup)


def place_local_features(forward: Function, group: ProcessGroup) -> Function:
    """A `FeaturePlaces.forward` for the tokens of this rank; the gradients of features are summed over all ranks."""

    def wrapped(features_MD: Tensor, hidden_BPD: Tensor, sources_BT: Tensor) -> Tensor:
        return forward(copy_to_group(features_MD, group), hidden_BPD, slice_local(sources_BT, group, 1))

    return wrapped
