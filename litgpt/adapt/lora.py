"""LoRA: a trained product of two low-rank matrices is added to each frozen matrix, W + s B A (Hu et al. 2021).

Axes: in and out, the sizes of a layer; r, the rank. Matrices of stacked experts have a leading axis of experts.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from litgpt.adapt.layers import (
    AdaptedLayer,
    InitValues,
    add_parameter,
    add_trained_copy,
    gather_full,
    get_base_shape,
    get_base_value,
    own_parameter,
    seeded_generator,
    upcast,
)
from litgpt.adapt.targets import find_by_suffix, find_owner, find_targets, get_module_aliases, resolve_tied_head
from litgpt.errors import UserError
from litgpt.model.gpt import GPT
from litgpt.model.moe import Experts, expert_of_rows, grouped_linear
from litgpt.model.surgery import add_mixin, override_parameter
from litgpt.recipe.tuner import LoRA

GetParameter = Callable[[str, str], Tensor | None]


class LoRALayer(AdaptedLayer):
    """A layer that computes with W + s (B A - first B first A) instead of some of its matrices.

    The parameters of the update of `weight` are `lora_a` (r, in) and `lora_b` (out, r). If their initial values are
    parts of W, `lora_a_first` and `lora_b_first` keep those, so that W itself does not change. DoRA adds
    `lora_magnitude` (out,), the norms of the rows. The parameters of another matrix are prefixed with its name.
    """

    lora_scale: float
    lora_dropout: float

    def get_lora(self, name: str, key: str) -> Tensor | None:
        """One of the parameters above, of the matrix `name`."""
        return self._parameters.get(lora_name(name, key))

    def merge_parameter(self, name: str) -> Tensor:
        """The full matrix `name` with its update."""

        def get_full(name: str, key: str) -> Tensor | None:
            parameter = self.get_lora(name, key)
            return None if parameter is None else upcast(gather_full(parameter))

        weight = super().merge_parameter(name)
        return weight if self.get_lora(name, "lora_a") is None else self.merge_update(name, weight, get_full)

    def merge_update(self, name: str, weight: Tensor, get: GetParameter, *, dropout: float = 0.0) -> Tensor:
        """The merged weight (out, in) of the matrix `name`; with DoRA, its rows have the trained norms.

        Args:
            dropout: probability of dropping a column of A, since no input can be dropped here.
        """
        a, b = get(name, "lora_a"), get(name, "lora_b")
        assert a is not None
        assert b is not None
        if dropout:
            a = a * F.dropout(torch.ones_like(a[..., :1, :]), dropout)
        update = b @ a
        a_first, b_first = get(name, "lora_a_first"), get(name, "lora_b_first")
        if a_first is not None and b_first is not None:
            update = update - b_first @ a_first
        weight = weight + (self.lora_scale * update).to(weight.dtype)
        magnitude = get(name, "lora_magnitude")
        if magnitude is None:
            return weight
        return weight * (magnitude / compute_row_norms(weight.detach())).unsqueeze(-1).to(weight.dtype)

    def adapt_parameter(self, name: str) -> Tensor:
        """The merged weight of the matrix `name`, for code that does not call the layer's `forward`."""
        weight = self.base_parameter(name)
        dropout = self.lora_dropout if self.training else 0.0
        return self.merge_update(name, weight, self.get_lora, dropout=dropout) if self.adapter_on else weight

    def init_values(self, settings: LoRA, seed: str) -> InitValues:
        """The update is zero at first; see `INIT_FACTORS`."""
        yield from super().init_values(settings, seed)
        for name in [name for name in list(self._parameters) if self.get_lora(name, "lora_a") is not None]:
            weight = get_base_value(self, name)
            rng = seeded_generator(f"{seed}/{lora_name(name, 'lora_a')}")
            a, b = INIT_FACTORS[settings.init](weight, settings, rng)
            yield lora_name(name, "lora_a"), a
            yield lora_name(name, "lora_b"), b
            if self.get_lora(name, "lora_a_first") is not None:
                yield lora_name(name, "lora_a_first"), a
                yield lora_name(name, "lora_b_first"), b
            if self.get_lora(name, "lora_magnitude") is not None:
                yield lora_name(name, "lora_magnitude"), compute_row_norms(weight)


class LoRALinear(LoRALayer):
    """A linear layer with a low-rank update that is never materialized: W x + s B (A x)."""

    def forward(self, x: Tensor) -> Tensor:
        """The output of the layer plus its update; (..., in) -> (..., out)."""
        y = super().forward(x)
        if not self.adapter_on:
            return y
        a, b, magnitude = (self.get_lora("weight", key) for key in ("lora_a", "lora_b", "lora_magnitude"))
        assert a is not None
        assert b is not None
        update = self.lora_scale * F.linear(lora_down(x, a, self.lora_dropout if self.training else 0.0), b)
        a_first, b_first = (self.get_lora("weight", key) for key in ("lora_a_first", "lora_b_first"))
        if a_first is not None and b_first is not None:
            update = update - self.lora_scale * F.linear(lora_down(x, a_first), b_first)
        update = update.to(y.dtype)
        if magnitude is None:
            return y + update
        with torch.no_grad():
            weight = self.merge_update("weight", self.base_parameter("weight"), self._get_without_magnitude)
            norms = compute_row_norms(weight)
        unscaled = (y if self.bias is None else y - self.bias) + update
        y = unscaled * (magnitude / norms).to(y.dtype)
        return y if self.bias is None else y + self.bias

    def _get_without_magnitude(self, name: str, key: str) -> Tensor | None:
        return None if key == "lora_magnitude" else self.get_lora(name, key)


class LoRAExperts(LoRALayer):
    """Stacked experts, each with low-rank updates of its own."""

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
        a, b = self.get_lora(name, "lora_a"), self.get_lora(name, "lora_b")
        bias_EO = getattr(self, f"{name}_bias") if add_bias else None
        if not self.adapter_on or a is None or b is None:
            return grouped_linear(x_RD, self.base_parameter(name), bias_EO, ends_E)
        if self.get_lora(name, "lora_magnitude") is not None:
            return grouped_linear(x_RD, self.adapt_parameter(name), bias_EO, ends_E)
        y_RO = grouped_linear(x_RD, self.base_parameter(name), bias_EO, ends_E)
        update = grouped_lora(F.dropout(x_RD, self.lora_dropout, self.training), a, b, ends_E)
        a_first, b_first = (self.get_lora(name, key) for key in ("lora_a_first", "lora_b_first"))
        if a_first is not None and b_first is not None:
            update = update - grouped_lora(x_RD, a_first, b_first, ends_E)
        return y_RO + (self.lora_scale * update).to(y_RO.dtype)


def grouped_lora(x_RD: Tensor, a: Tensor, b: Tensor, ends_E: Tensor) -> Tensor:
    """B A x with the pair of each row's expert, (R, out)."""
    return grouped_linear(grouped_linear(x_RD, a, None, ends_E), b, None, ends_E)


def lora_down(x: Tensor, a: Tensor, dropout: float = 0.0) -> Tensor:
    """The down projection A x, (..., r), with dropout on x; computed in the type of A or of autocast."""
    device = x.device.type
    compute_dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else a.dtype
    x, a = x.to(compute_dtype), a.to(compute_dtype)
    return LoRADown.apply(x, a, dropout) if dropout else F.linear(x, a)


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
    u, values, v = torch.linalg.svd(weight, full_matrices=False)
    roots = (values[..., : settings.r] / settings.scale).sqrt()
    return roots.unsqueeze(-1) * v[..., : settings.r, :], u[..., : settings.r] * roots.unsqueeze(-2)


def init_olora(weight: Tensor, settings: LoRA, _rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """The first r columns of Q as B and rows of R as A, where W = Q R (Büyükakyüz 2024, algorithm 1)."""
    q, r = torch.linalg.qr(weight)
    return r[..., : settings.r, :], q[..., : settings.r]


INIT_FACTORS = {"default": init_random, "gaussian": init_random, "pissa": init_pissa, "olora": init_olora}


def attach_lora(model: GPT, settings: LoRA) -> None:
    """Add an update to every matrix that the settings name, and trained copies of the other parameters they name.

    Raises:
        UserError: if a name matches nothing, or a target is not a matrix.
    """
    aliases = get_module_aliases(model)
    targets = find_targets(model, aliases, settings.target_modules, settings.target_regex)
    saved = find_by_suffix("tuner.modules_to_save", resolve_tied_head(model, settings.modules_to_save), aliases)
    if both := sorted(saved & set(targets)):
        raise UserError(f"tuner.modules_to_save: {both[0]} is one of the target_modules too; name it in one of them")
    modules = [find_owner(model, name) for name in sorted(saved)]
    trained_copies = [(module, key) for module in modules for key in list_own_parameters(module)]
    if settings.bias == "all":
        trained_copies += [
            (module, key) for module in model.modules() for key in list_own_parameters(module) if is_bias(key)
        ]
    for module, key in trained_copies:
        add_trained_copy(module, key)
    for name in targets:
        add_lora(model, name, settings)


def list_own_parameters(module: nn.Module) -> list[str]:
    """The names of the parameters that a module itself holds."""
    return [key for key, parameter in module._parameters.items() if parameter is not None]


def is_bias(key: str) -> bool:
    """Whether a parameter is a bias, by its name."""
    return key == "bias" or key.endswith("_bias")


def add_lora(model: GPT, name: str, settings: LoRA) -> None:
    """Add the update of one matrix, named as in `get_module_aliases`."""
    layer = find_owner(model, name)
    key = name.rpartition(".")[2] if isinstance(layer, Experts) else "weight"
    shape = get_base_shape(layer, key) if key in layer._parameters else ()
    if len(shape) < 2:
        raise UserError(f"tuner.target_modules: {name} is not a matrix; name it in modules_to_save to train it")
    weight = own_parameter(layer, key)
    *experts, rows, columns = shape
    if settings.init in ("pissa", "olora") and settings.r > min(rows, columns):
        raise UserError(
            f"tuner.r: {settings.r} is more than the {min(rows, columns)} that {name} has for {settings.init}"
        )
    for factor, shape in {"lora_a": (*experts, settings.r, columns), "lora_b": (*experts, rows, settings.r)}.items():
        add_parameter(layer, lora_name(key, factor), shape, weight)
        if settings.init in ("pissa", "olora"):
            add_parameter(layer, lora_name(key, f"{factor}_first"), shape, weight, trained=False)
    if settings.dora:
        add_parameter(layer, lora_name(key, "lora_magnitude"), (*experts, rows), weight)
    layer.lora_scale, layer.lora_dropout = settings.scale, settings.dropout  # type: ignore[assignment]
    if isinstance(layer, nn.Linear) and name != "head":
        add_mixin(layer, LoRALinear)
    elif isinstance(layer, Experts):
        add_mixin(layer, LoRAExperts)
    else:
        add_mixin(layer, LoRALayer)
        override_parameter(layer, key, LoRALayer.adapt_parameter)
