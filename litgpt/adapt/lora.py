"""LoRA: a trained product of two low-rank matrices is added to each frozen matrix, W + s B A (Hu et al. 2021).

Axes: in and out, the sizes of a layer; r, the rank. Matrices of stacked experts have a leading axis of experts.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from litgpt.adapt.layers import (
    AdaptedLayer,
    InitValues,
    add_parameter,
    add_trained_copy,
    gather_value,
    get_base_value,
    is_quantized,
)
from litgpt.adapt.targets import (
    OUTPUT_LAYERS,
    find_by_suffix,
    find_owner,
    find_targets,
    get_module_aliases,
    is_prediction,
    resolve_tied_head,
)
from litgpt.errors import UserError
from litgpt.model.gpt import GPT
from litgpt.model.init import seeded_generator
from litgpt.model.moe import Experts, expert_of_rows, grouped_linear
from litgpt.model.surgery import add_mixin, override_parameter
from litgpt.recipe.tuner import LoRA


class LoRAFactors(NamedTuple):
    """The parameters of the update of one matrix, described in `LoRALayer`."""

    a: Tensor
    b: Tensor
    a_first: Tensor | None
    b_first: Tensor | None
    magnitude: Tensor | None


class LoRALayer(AdaptedLayer):
    """A layer that computes with W + s (B A - first B first A) instead of some of its matrices.

    The parameters of the update of `weight` are `lora_a` (r, in) and `lora_b` (out, r). If their initial values are
    parts of W, `lora_a_first` and `lora_b_first` store these, so that W itself does not change. DoRA adds
    `lora_magnitude` (out,), the norms of the rows. The parameters of another matrix are prefixed with its name.
    A weight that LoftQ quantized is already without `lora_b_first` `lora_a_first`.
    """

    lora_scale: float
    lora_dropout: float
    subtracts_first = True

    def get_factors(self, name: str, *, full: bool = False) -> LoRAFactors | None:
        """The parameters of the update of the matrix `name`; None if it has none.

        Args:
            full: gather sharded ones, and return them in float32 or wider.
        """
        get: Callable[[str], Any] = partial(gather_value, self) if full else self._parameters.get
        keys = [lora_name(name, f"lora_{key}") for key in LoRAFactors._fields]
        used = [key in self._parameters and (self.subtracts_first or not key.endswith("_first")) for key in keys]
        values: list[Any] = [get(key) if is_used else None for key, is_used in zip(keys, used, strict=True)]
        return None if values[0] is None else LoRAFactors(*values)

    def merge_parameter(self, name: str) -> Tensor:
        """The full matrix `name` with its update."""
        weight, factors = super().merge_parameter(name), self.get_factors(name, full=True)
        return weight if factors is None else self.merge_update(weight, factors)

    def add_update(self, weight: Tensor, factors: LoRAFactors, dropout: float = 0.0) -> Tensor:
        """A matrix (out, in) plus its update.

        Args:
            dropout: probability of dropping a column of A, since no input can be dropped here.
        """
        a, b, a_first, b_first, _ = factors
        if dropout:
            a = a * F.dropout(torch.ones_like(a[..., :1, :]), dropout)
        update = b @ a
        if a_first is not None and b_first is not None:
            update = update - b_first @ a_first
        return weight + (self.lora_scale * update).to(weight.dtype)

    def merge_update(self, weight: Tensor, factors: LoRAFactors, dropout: float = 0.0) -> Tensor:
        """A matrix (out, in) plus its update; with DoRA, scaled so that its rows have the trained norms."""
        weight = self.add_update(weight, factors, dropout)
        if factors.magnitude is None:
            return weight
        return weight * (factors.magnitude / compute_row_norms(weight.detach())).unsqueeze(-1).to(weight.dtype)

    def adapt_parameter(self, name: str) -> Tensor:
        """The merged weight of the matrix `name`, for code that does not call the layer's `forward`."""
        weight, factors = self.base_parameter(name), self.get_factors(name)
        if not self.adapter_on or factors is None:
            return weight
        return self.merge_update(weight, factors, self.lora_dropout if self.training else 0.0)

    def init_values(self, settings: LoRA, seed: str) -> InitValues:
        """The update is zero at first; see `INIT_FACTORS`."""
        for name in [name for name in self._parameters if self.get_factors(name)]:
            weight = get_base_value(self, name)
            rng = seeded_generator(f"{seed}/{lora_name(name, 'lora_a')}")
            a, b = INIT_FACTORS[settings.init](weight, settings, rng)
            values = {"lora_a": a, "lora_b": b, "lora_a_first": a, "lora_b_first": b}
            values["lora_magnitude"] = compute_row_norms(weight)
            for key, value in values.items():
                if lora_name(name, key) in self._parameters:
                    yield lora_name(name, key), value


class LoRALinear(LoRALayer):
    """A linear layer with a low-rank update that is never materialized: W x + s B (A x)."""

    def forward(self, x: Tensor) -> Tensor:
        """The output of the layer plus its update; (..., in) -> (..., out)."""
        y, factors = super().forward(x), self.get_factors("weight")
        if not self.adapter_on or factors is None:
            return y
        a, b, a_first, b_first, magnitude = factors
        update = self.lora_scale * lora_up(lora_down(x, a, self.lora_dropout if self.training else 0.0), b)
        if a_first is not None and b_first is not None:
            update = update - self.lora_scale * lora_up(lora_down(x, a_first), b_first)
        update = update.to(y.dtype)
        if magnitude is None:
            return y + update
        with torch.no_grad():
            norms = compute_row_norms(self.add_update(self.base_parameter("weight"), factors))
        unscaled = (y if self.bias is None else y - self.bias) + update
        y = unscaled * (magnitude / norms).to(y.dtype)
        return y if self.bias is None else y + self.bias


class LoRAExperts(LoRALayer):
    """Stacked experts with low-rank updates for each expert."""

    gating: Callable[[Tensor, Tensor], Tensor]

    def forward(self, x_RD: Tensor, ends_E: Tensor, weights_R: Tensor | None = None) -> Tensor:
        """The same as `Experts.forward`, with the updated matrices."""
        gate_RI, up_RI = (self.apply_matrix(name, x_RD, ends_E) for name in ("gate", "up"))
        inner_RI = self.gating(gate_RI, up_RI)
        if weights_R is None:
            return self.apply_matrix("down", inner_RI, ends_E)
        y_RD = self.apply_matrix("down", inner_RI * weights_R.to(inner_RI.dtype), ends_E, add_bias=False)
        bias_ED = getattr(self, "down_bias", None)
        if bias_ED is None:
            return y_RD
        return y_RD + (bias_ED.index_select(0, expert_of_rows(ends_E, len(y_RD))) * weights_R).to(y_RD.dtype)

    def apply_matrix(self, name: str, x_RD: Tensor, ends_E: Tensor, *, add_bias: bool = True) -> Tensor:
        """Each row times the updated matrix of its expert, (R, out)."""
        factors, bias_EO = self.get_factors(name), getattr(self, f"{name}_bias") if add_bias else None
        if not self.adapter_on or factors is None or factors.magnitude is not None:
            return grouped_linear(x_RD, self.adapt_parameter(name), bias_EO, ends_E)
        a, b, a_first, b_first, _ = factors
        y_RO = grouped_linear(x_RD, self.base_parameter(name), bias_EO, ends_E)
        update = grouped_lora(F.dropout(x_RD, self.lora_dropout, self.training), a, b, ends_E)
        if a_first is not None and b_first is not None:
            update = update - grouped_lora(x_RD, a_first, b_first, ends_E)
        return y_RO + (self.lora_scale * update).to(y_RO.dtype)


def grouped_lora(x_RD: Tensor, a: Tensor, b: Tensor, ends_E: Tensor) -> Tensor:
    """B A x with the pair of each row's expert, (R, out)."""
    return grouped_linear(grouped_linear(x_RD, a, None, ends_E), b, None, ends_E)


def lora_down(x: Tensor, a: Tensor, dropout: float = 0.0) -> Tensor:
    """The down projection A x, (..., r), with dropout on x; computed in the type of x or of autocast.

    A may have a wider type than x, which comes from a quantized layer in 16 bits.
    """
    device = x.device.type
    compute_dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    x, a = x.to(compute_dtype), a.to(compute_dtype)
    return LoRADown.apply(x, a, dropout) if dropout else F.linear(x, a)


def lora_up(down: Tensor, b: Tensor) -> Tensor:
    """The up projection of A x, (..., out); computed in the type of A x."""
    return F.linear(down, b.to(down.dtype))


class LoRADown(torch.autograd.Function):
    """A x with dropout that saves the mask and x, which neighbouring layers save too, rather than their product."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, dropout: float) -> Tensor:
        dropped, mask = torch.native_dropout(x, dropout, True)
        ctx.save_for_backward(x, mask, a)
        ctx.scale = 1 / (1 - dropout) if dropout < 1 else 0.0
        return F.linear(dropped, a)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, mask, a = ctx.saved_tensors
        grad_x, grad_a = None, None
        if ctx.needs_input_grad[0]:
            grad_x = torch.ops.aten.native_dropout_backward(grad @ a, mask, ctx.scale)
        if ctx.needs_input_grad[1]:
            dropped = torch.ops.aten.native_dropout_backward(x, mask, ctx.scale)
            grad_a = grad.flatten(0, -2).T @ dropped.flatten(0, -2)
        return grad_x, grad_a, None


def compute_row_norms(weight: Tensor) -> Tensor:
    """The L2 norm of each row of a matrix, (out,)."""
    return torch.linalg.vector_norm(weight, dim=-1)


def lora_name(name: str, key: str) -> str:
    """The name of a parameter of the update of the matrix `name`."""
    return key if name == "weight" else f"{name}_{key}"


def init_random(weight: Tensor, settings: LoRA, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """A uniform within 1 / sqrt(in), or normal with a standard deviation of 1 / r, and B = 0."""
    *experts, rows, columns = weight.shape
    a = torch.empty(*experts, settings.r, columns)
    if settings.init == "gaussian":
        a.normal_(0, 1 / settings.r, generator=rng)
    else:
        a.uniform_(-1 / math.sqrt(columns), 1 / math.sqrt(columns), generator=rng)
    return a, torch.zeros(*experts, rows, settings.r)


def init_pissa(weight: Tensor, settings: LoRA, _rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """s B A is the part of W with the r largest singular values (Meng et al. 2024, eq. 2 to 4)."""
    return decompose(weight, settings)


def decompose(matrix: Tensor, settings: LoRA) -> tuple[Tensor, Tensor]:
    """A and B for which s B A is the part of a matrix with the r largest singular values, which both share equally."""
    u, values, v = torch.linalg.svd(matrix, full_matrices=False)
    roots = (values[..., : settings.r] / settings.scale).sqrt()
    return roots.unsqueeze(-1) * v[..., : settings.r, :], u[..., : settings.r] * roots.unsqueeze(-2)


def init_olora(weight: Tensor, settings: LoRA, _rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """The first r columns of Q as B and rows of R as A, where W = Q R (Büyükakyüz 2024, algorithm 1)."""
    q, r = torch.linalg.qr(weight)
    return r[..., : settings.r, :], q[..., : settings.r]


def init_lora_ga(gradient: Tensor, settings: LoRA) -> tuple[Tensor, Tensor]:
    """Singular vectors of the gradient of W, so that the first step is nearest to one of W (Wang et al. 2024).

    A has rows of V and B columns of U, of different singular values among the first 2 r (theorem 3.1), both times
    out^(1/4) / gamma^(1/2) (theorem 3.2).
    """
    r = settings.r
    u, _, v = torch.linalg.svd(gradient, full_matrices=False)
    of_a, of_b = {
        "ArBr": (slice(1, 2 * r, 2), slice(0, 2 * r, 2)),
        "A2rBr": (slice(r, 2 * r), slice(r)),
        "ArB2r": (slice(r), slice(r, 2 * r)),
    }[settings.ga_direction]
    scale = gradient.shape[-2] ** 0.25 / settings.ga_gamma**0.5 if settings.ga_scale == "stable" else 1.0
    return scale * v[..., of_a, :], scale * u[..., of_b]


INIT_FACTORS = {
    **dict.fromkeys(("default", "gaussian", "loftq", "lora_ga"), init_random),
    "pissa": init_pissa,
    "olora": init_olora,
}
"""The first values; those of LoftQ and LoRA-GA are replaced once the weights or their gradients are known."""
SINGULAR_VALUES = {"pissa": 1, "olora": 1, "loftq": 1, "lora_ga": 2}
"""How many times r singular values an initialization takes of each matrix."""


def attach_lora(model: GPT, settings: LoRA) -> None:
    """Add an update to every matrix that the settings name, and trained copies of the other parameters they name.

    Raises:
        UserError: if a name matches nothing, or a target is not a matrix.
    """
    aliases = get_module_aliases(model)
    targets = find_targets(model, aliases, settings.target_modules, settings.target_regex)
    saved = find_by_suffix("tuner.modules_to_save", resolve_tied_head(model, settings.modules_to_save), aliases)
    if both := sorted(saved & set(targets)):
        raise UserError(f"tuner.modules_to_save: {both[0]} is also in target_modules; remove it from one of them")
    modules = [find_owner(model, name) for name in sorted(saved)]
    trained_copies = [(module, key) for module in modules for key, _ in module.named_parameters(recurse=False)]
    if settings.bias == "all":
        names = [name for name, _ in model.named_parameters() if name.endswith((".bias", "_bias"))]
        names = [name for name in names if not is_prediction(model, name)]
        trained_copies += [(find_owner(model, name), name.rpartition(".")[2]) for name in names]
    if settings.bias == "lora_only":
        owners = [find_owner(model, name) for name in targets]
        trained_copies += [(owner, "bias") for owner in owners if owner._parameters.get("bias") is not None]
    for module, key in trained_copies:
        add_trained_copy(module, key)
    for name in targets:
        add_lora(model, name, settings)


def add_lora(model: GPT, name: str, settings: LoRA) -> None:
    """Add the update of one matrix, named as in `get_module_aliases`."""
    layer = find_owner(model, name)
    key = name.rpartition(".")[2] if isinstance(layer, Experts) else "weight"
    weight = layer._parameters.get(key)
    shape = () if weight is None else tuple(weight.shape)
    if isinstance(layer, nn.Linear):  # the parameter of a quantized weight is flat
        shape = (layer.out_features, layer.in_features)
    if weight is None or len(shape) < 2:
        raise UserError(f"tuner.target_modules: {name} is not a matrix; name it in modules_to_save to train it")
    *experts, rows, columns = shape
    taken = SINGULAR_VALUES.get(settings.init)
    if taken and settings.r > (most := min(rows, columns) // taken):
        raise UserError(f"tuner.r: {settings.r} is more than the {most} that {name} has for {settings.init}")
    for factor, size in {"lora_a": (settings.r, columns), "lora_b": (rows, settings.r)}.items():
        add_parameter(layer, lora_name(key, factor), (*experts, *size), weight)
        if settings.stores_first:
            add_parameter(layer, lora_name(key, f"{factor}_first"), (*experts, *size), weight, trained=False)
    if settings.dora:
        add_parameter(layer, lora_name(key, "lora_magnitude"), (*experts, rows), weight)
    layer.lora_scale, layer.lora_dropout = settings.scale, settings.dropout  # type: ignore[assignment]
    if settings.init == "loftq" and is_quantized(layer, key):
        layer.subtracts_first = False  # type: ignore[assignment]
    if isinstance(layer, nn.Linear) and name not in OUTPUT_LAYERS:
        add_mixin(layer, LoRALinear)
    elif isinstance(layer, Experts):
        add_mixin(layer, LoRAExperts)
    else:
        add_mixin(layer, LoRALayer)
        override_parameter(layer, key, LoRALayer.adapt_parameter)
