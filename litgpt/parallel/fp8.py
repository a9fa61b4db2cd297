"""Select the layers of a model whose products are computed in FP8, and change them."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import nn

from litgpt.errors import UserError
from litgpt.model.config import Config
from litgpt.model.delayed_scaling import AmaxHistory
from litgpt.model.fp8 import (
    EXPERT_MATRICES,
    SIZE_UNITS,
    build_float8_config,
    build_mm_config,
    build_product,
    import_float8,
    is_emulated,
    use_fp8,
)
from litgpt.model.gpt import GPT
from litgpt.model.moe import Experts
from litgpt.parallel.tensor import SPLIT_DIMS, find_split_kind
from litgpt.recipe.fp8 import FP8Args
from litgpt.recipe.parallel import ParallelDims


@dataclass
class FP8Layers:
    """The names of modules.

    Attributes:
        fitting: those with products in FP8.
        misfits: those whose sizes on a rank, (out, in), are no multiples of the recipe's unit.
    """

    fitting: list[str] = field(default_factory=list)
    misfits: dict[str, tuple[int, int]] = field(default_factory=dict)


def select_fp8_layers(model: GPT, settings: FP8Args, dims: ParallelDims) -> FP8Layers:
    """Select the layers of a whole model, which may be on the meta device.

    Raises:
        UserError: if a name to exclude matches nothing, or no layer is left.
    """
    assert settings.recipe is not None
    unit, layers, excluded = SIZE_UNITS[settings.recipe], FP8Layers(), dict.fromkeys(settings.exclude, False)
    last = model.config.n_layer - settings.num_layers_at_end_in_bf16
    for name, sizes in iter_matrices(model, dims):
        matching = [part for part in settings.exclude if f".{part}." in f".{name}."]
        excluded |= dict.fromkeys(matching, True)
        if matching or not settings.num_layers_at_start_in_bf16 <= int(name.split(".")[1]) < last:
            continue
        if any(size % unit for size in sizes):
            layers.misfits[name] = sizes
        else:
            layers.fitting.append(name)
    if unknown := [part for part, matches in excluded.items() if not matches]:
        names = ", ".join(dict.fromkeys(name.split(".", 2)[2] for name, _ in iter_matrices(model, dims)))
        raise UserError(f"fp8.exclude: {unknown[0]} matches no layer; use parts of the names blocks.N.{{{names}}}")
    if not layers.fitting:
        raise UserError(
            f"fp8.recipe: {settings.recipe} has no layer: none is left whose sizes are multiples of {unit}; "
            + ("set fp8.recipe: null" if unit == min(SIZE_UNITS.values()) else "set fp8.recipe: tensorwise")
        )
    return layers


def iter_matrices(model: GPT, dims: ParallelDims) -> Iterator[tuple[str, tuple[int, int]]]:
    """The names of the linear layers and the experts of all blocks, and their sizes (out, in) on a rank.

    Router and gate of shared experts, which have few outputs, are not among them.
    """
    config = model.config
    for name, module in model.blocks.named_modules(prefix="blocks"):
        if isinstance(module, Experts):
            yield name, (config.expert_size // dims.expert_tensor, config.n_embd)
        elif isinstance(module, nn.Linear) and module.out_features > 1:
            yield name, get_local_sizes(name, module, config, dims.tensor)


def get_local_sizes(name: str, layer: nn.Linear, config: Config, ranks: int) -> tuple[int, int]:
    """The sizes (out, in) of a rank's part of a layer under tensor parallelism."""
    sizes, kind = [layer.out_features, layer.in_features], find_split_kind(name)
    if kind is not None:
        parts = min(ranks, config.n_query_groups or config.n_head) if kind == "groups" else ranks
        sizes[SPLIT_DIMS[kind]["weight"]] //= parts
    return sizes[0], sizes[1]


def apply_fp8(model: GPT, settings: FP8Args, dims: ParallelDims, device: torch.device) -> AmaxHistory | None:
    """Let the selected layers of a whole model, on the meta device, compute their products in FP8.

    Args:
        dims: of the layout that the model is split and sharded by later.
        device: that the model will compute on.

    Returns:
        the values that delayed scales are computed from; None for other recipes.

    Raises:
        UserError: as for `select_fp8_layers`, or if torchao is not installed.
    """
    if settings.recipe is None:
        return None
    names = select_fp8_layers(model, settings, dims).fitting
    modules = {name: model.get_submodule(name) for name in names}
    keys = {name: EXPERT_MATRICES if isinstance(module, Experts) else ("weight",) for name, module in modules.items()}
    formats, emulate = settings.resolved_format, is_emulated(settings.recipe, device)
    history = None
    if settings.recipe == "delayed":
        history = AmaxHistory(
            [f"{name}.{key}" for name in names for key in keys[name]],
            length=settings.amax_history_len,
            algorithm=settings.amax_compute_algo,
            formats=formats,
            emulate=emulate,
            device=device,
        )
    product = build_product(settings.recipe, formats, emulate=emulate) if history is None else None
    for name, module in modules.items():
        products = {key: product or history.build_product(f"{name}.{key}") for key in keys[name]}  # type: ignore[union-attr]
        use_fp8(module, products, SIZE_UNITS[settings.recipe])
        if settings.param_gather and dims.shard > 1 and isinstance(module, nn.Linear):
            gather_in_fp8(module, formats, emulate=emulate)
    return history


def gather_in_fp8(layer: nn.Linear, formats: str, *, emulate: bool) -> None:
    """Let FSDP2 cast the weight of a layer to FP8 before it gathers it."""
    config = build_float8_config("tensorwise", formats, emulate=emulate)
    weight_class = import_float8("float8.fsdp_utils").WeightWithDynamicFloat8CastTensor
    weight = weight_class(layer.weight.detach(), build_mm_config(config), config.cast_config_weight.target_dtype)
    layer.weight = nn.Parameter(weight, requires_grad=layer.weight.requires_grad)


def describe_fp8(model: GPT, settings: FP8Args, dims: ParallelDims, device: torch.device) -> list[str]:
    """Describe how a device computes the recipe, if it emulates it, and the layers that do not fit; one line each."""
    if settings.recipe is None:
        return []
    lines, layers = [], select_fp8_layers(model, settings, dims)
    if is_emulated(settings.recipe, device):
        lines.append(
            f"fp8.recipe: {settings.recipe} is emulated, which is slower than bf16: this device has no hardware for it"
        )
    if layers.misfits:
        (name, (rows, columns)), count = next(iter(layers.misfits.items())), len(layers.misfits)
        lines.append(
            f"fp8.recipe: {settings.recipe} leaves {count} of {count + len(layers.fitting)} layers in bf16, whose "
            f"sizes are not multiples of {SIZE_UNITS[settings.recipe]}, such as {name} ({rows} x {columns})"
        )
    if settings.param_gather and dims.shard == 1:
        lines.append("fp8.param_gather: true has no effect with 1 shard; set parallel.data_shard: 2")
    return lines
