"""LoRA: a trained product of two thin matrices beside each frozen one, W + s B A (Hu et al. 2021).

Axes: in and out, the widths of a layer; r, the rank. Of stacked experts every matrix has an axis of experts before.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from litgpt.adapt.layers import (
    Adapted,
    InitValues,
    add,
    generator,
    shape_of,
    stored,
    train_copy,
    whole,
    widened,
)
from litgpt.adapt.targets import for_tied, found_by_ending, modules_known_as, owner_of, targets_of
from litgpt.errors import UserError
from litgpt.model.gpt import GPT
from litgpt.model.moe import Experts, grouped_linear, owners
from litgpt.model.surgery import add_mixin, override_parameter
from litgpt.recipe.tuner import LoRA

Part = Callable[[str, str], Tensor | None]


class LoRALayer(Adapted):
    """A layer that computes with W + s (B A - first B first A) in place of some of its matrices.

    The parameters of the update of `weight` are `lora_a` (r, in) and `lora_b` (out, r). Where their first values are
    parts of W, `lora_a_first` and `lora_b_first` keep those, so that W itself stays as it is. DoRA has
    `lora_magnitude` (out,), the lengths of the rows. The parameters of another matrix have its name in front.
    """

    lora_scale: float
    lora_dropout: float

    def part(self, name: str, key: str) -> Tensor | None:
        """One of the parameters above, of the matrix `name`."""
        return self._parameters.get(part_name(name, key))

    def merged(self, name: str) -> Tensor:
        def gathered(name: str, key: str) -> Tensor | None:
            part = self.part(name, key)
            return None if part is None else widened(whole(part))

        weight = super().merged(name)
        return weight if self.part(name, "lora_a") is None else self.merge_update(name, weight, gathered)

    def merge_update(self, name: str, weight: Tensor, part: Part, *, dropout: float = 0.0) -> Tensor:
        """(out, in), the matrix `name` with its update, and rows of the lengths that DoRA trains.

        Args:
            dropout: share of the columns of A that are left out, as no input is seen here.
        """
        a, b = part(name, "lora_a"), part(name, "lora_b")
        assert a is not None and b is not None
        if dropout:
            a = a * F.dropout(torch.ones_like(a[..., :1, :]), dropout)
        update = b @ a
        a_first, b_first = part(name, "lora_a_first"), part(name, "lora_b_first")
        if a_first is not None and b_first is not None:
            update = update - b_first @ a_first
        weight = weight + (self.lora_scale * update).to(weight.dtype)
        magnitude = part(name, "lora_magnitude")
        if magnitude is None:
            return weight
        return weight * (magnitude / row_lengths(weight.detach())).unsqueeze(-1).to(weight.dtype)

    def answer(self, name: str) -> Tensor:
        """The matrix `name` to compute with."""
        if not self.adapter_on:
            return self.frozen(name)
        return self.merge_update(
            name, self.frozen(name), self.part, dropout=self.lora_dropout if self.training else 0.0
        )

    def init_values(self, settings: LoRA, seed: str) -> InitValues:
        yield from super().init_values(settings, seed)
        for name in [name for name in list(self._parameters) if self.part(name, "lora_a") is not None]:
            weight = self.base(name)
            a, b = FACTORS[settings.init](weight, settings, generator(f"{seed}/{part_name(name, 'lora_a')}"))
            yield part_name(name, "lora_a"), a
            yield part_name(name, "lora_b"), b
            if self.part(name, "lora_a_first") is not None:
                yield part_name(name, "lora_a_first"), a
                yield part_name(name, "lora_b_first"), b
            if self.part(name, "lora_magnitude") is not None:
                yield part_name(name, "lora_magnitude"), row_lengths(weight)


class LoRALinear(LoRALayer):
    """A linear layer with an update of low rank, whose whole matrix is never made: W x + s B (A x)."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        if not self.adapter_on:
            return y
        a, b, magnitude = (self.part("weight", key) for key in ("lora_a", "lora_b", "lora_magnitude"))
        assert a is not None and b is not None
        update = self.lora_scale * F.linear(lora_down(x, a, self.lora_dropout if self.training else 0.0), b)
        a_first, b_first = (self.part("weight", key) for key in ("lora_a_first", "lora_b_first"))
        if a_first is not None and b_first is not None:
            update = update - self.lora_scale * F.linear(lora_down(x, a_first), b_first)
        update = update.to(y.dtype)
        if magnitude is None:
            return y + update
        with torch.no_grad():
            lengths = row_lengths(self.merge_update("weight", self.frozen("weight"), self._without_magnitude))
        turned = (y if self.bias is None else y - self.bias) + update
        y = turned * (magnitude / lengths).to(y.dtype)
        return y if self.bias is None else y + self.bias

    def _without_magnitude(self, name: str, key: str) -> Tensor | None:
        return None if key == "lora_magnitude" else self.part(name, key)


class LoRAExperts(LoRALayer):
    """Stacked experts, each with updates of low rank of its own."""

    gating: Callable[[Tensor, Tensor], Tensor]

    def forward(self, x_RD: Tensor, ends_E: Tensor, weights_R: Tensor | None = None) -> Tensor:
        """What `Experts.forward` computes, of the updated matrices."""
        gate_RI, up_RI = (self.linear(name, x_RD, ends_E) for name in ("gate", "up"))
        inner_RI = self.gating(gate_RI, up_RI)
        if weights_R is None:
            return self.linear("down", inner_RI, ends_E)
        y_RD = self.linear("down", inner_RI * weights_R.to(inner_RI.dtype), ends_E, biased=False)
        bias_ED = getattr(self, "down_bias", None)
        if bias_ED is None:
            return y_RD
        return y_RD + (bias_ED.index_select(0, owners(ends_E, len(y_RD))) * weights_R).to(y_RD.dtype)

    def linear(self, name: str, x_RD: Tensor, ends_E: Tensor, *, biased: bool = True) -> Tensor:
        """Each row through the matrix of its expert and its update, (R, out)."""
        a, b = self.part(name, "lora_a"), self.part(name, "lora_b")
        bias_EO = getattr(self, f"{name}_bias") if biased else None
        if not self.adapter_on or a is None or b is None:
            return grouped_linear(x_RD, self.frozen(name), bias_EO, ends_E)
        if self.part(name, "lora_magnitude") is not None:
            return grouped_linear(x_RD, self.answer(name), bias_EO, ends_E)
        y_RO = grouped_linear(x_RD, self.frozen(name), bias_EO, ends_E)
        update = grouped_through(F.dropout(x_RD, self.lora_dropout, self.training), a, b, ends_E)
        a_first, b_first = (self.part(name, key) for key in ("lora_a_first", "lora_b_first"))
        if a_first is not None and b_first is not None:
            update = update - grouped_through(x_RD, a_first, b_first, ends_E)
        return y_RO + (self.lora_scale * update).to(y_RO.dtype)


def grouped_through(x_RD: Tensor, a: Tensor, b: Tensor, ends_E: Tensor) -> Tensor:
    """B A x with each expert's own pair for its rows, (R, out)."""
    return grouped_linear(grouped_linear(x_RD, a, None, ends_E), b, None, ends_E)


def lora_down(x: Tensor, a: Tensor, dropout: float = 0.0) -> Tensor:
    """A x, (..., r), in the type of A or autocast's, with some numbers of x left out at random."""
    device = x.device.type
    compute = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else a.dtype
    x, a = x.to(compute), a.to(compute)
    return LoRADown.apply(x, a, dropout) if dropout else F.linear(x, a)


class LoRADown(torch.autograd.Function):
    """A x with dropout: keeps x, which the layers beside share, and which numbers stay; not their products."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, dropout: float) -> Tensor:
        thin, kept = torch.native_dropout(x, dropout, True)
        ctx.save_for_backward(x, kept, a)
        ctx.growth = 1 / (1 - dropout) if dropout < 1 else 0.0
        return F.linear(thin, a)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        x, kept, a = ctx.saved_tensors
        slope_x, slope_a = None, None
        if ctx.needs_input_grad[0]:
            slope_x = torch.ops.aten.native_dropout_backward(slope @ a, kept, ctx.growth)
        if ctx.needs_input_grad[1]:
            thin = torch.ops.aten.native_dropout_backward(x, kept, ctx.growth)
            slope_a = slope.flatten(0, -2).T @ thin.flatten(0, -2)
        return slope_x, slope_a, None


def row_lengths(weight: Tensor) -> Tensor:
    """The length of each row of a matrix, (out,)."""
    return torch.linalg.vector_norm(weight, dim=-1)


def part_name(name: str, key: str) -> str:
    """What a parameter of the update of the matrix `name` is called."""
    return key if name == "weight" else f"{name}_{key}"


def random_factors(weight: Tensor, settings: LoRA, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """A uniform within 1 / sqrt(in), or normal with a deviation of 1 / r, and B = 0."""
    *experts, rows, columns = weight.shape
    a = torch.empty(*experts, settings.r, columns)
    if settings.init == "gaussian":
        a.normal_(0, 1 / settings.r, generator=draw)
    else:
        a.uniform_(-1 / math.sqrt(columns), 1 / math.sqrt(columns), generator=draw)
    return a, torch.zeros(*experts, rows, settings.r)


def principal_factors(weight: Tensor, settings: LoRA, _: torch.Generator) -> tuple[Tensor, Tensor]:
    """s B A is the part of W with the r largest singular values (Meng et al. 2024, eq. 2 to 4)."""
    u, values, v = torch.linalg.svd(weight, full_matrices=False)
    roots = (values[..., : settings.r] / settings.scale).sqrt()
    return roots.unsqueeze(-1) * v[..., : settings.r, :], u[..., : settings.r] * roots.unsqueeze(-2)


def orthonormal_factors(weight: Tensor, settings: LoRA, _: torch.Generator) -> tuple[Tensor, Tensor]:
    """The first r columns of Q as B and rows of R as A, where W = Q R (Büyükakyüz 2024, algorithm 1)."""
    q, r = torch.linalg.qr(weight)
    return r[..., : settings.r, :], q[..., : settings.r]


FACTORS = {
    "default": random_factors,
    "gaussian": random_factors,
    "pissa": principal_factors,
    "olora": orthonormal_factors,
}


def attach(model: GPT, settings: LoRA) -> None:
    """Add an update to every matrix that the settings name, and trained copies of what else they name.

    Raises:
        UserError: for a name that stands for nothing, or for something that is no matrix.
    """
    known = modules_known_as(model)
    targets = targets_of(model, known, settings.target_modules, settings.target_regex)
    saved = found_by_ending("tuner.modules_to_save", for_tied(model, settings.modules_to_save), known)
    if both := sorted(saved & set(targets)):
        raise UserError(f"tuner.modules_to_save: {both[0]} is one of the target_modules too; name it in one of them")
    copied = [(owner_of(model, name), key) for name in sorted(saved) for key in own_parameters(owner_of(model, name))]
    if settings.bias == "all":
        copied += [(module, key) for module in model.modules() for key in own_parameters(module) if is_bias(key)]
    for module, key in copied:
        train_copy(module, key)
    for name in targets:
        add_update(model, name, settings)


def own_parameters(module: nn.Module) -> list[str]:
    """The parameters that a module itself holds."""
    return [key for key, parameter in module._parameters.items() if parameter is not None]


def is_bias(key: str) -> bool:
    """Whether a parameter is a bias, by its name."""
    return key == "bias" or key.endswith("_bias")


def add_update(model: GPT, name: str, settings: LoRA) -> None:
    """Add the update of one matrix, named as `modules_known_as` does."""
    layer = owner_of(model, name)
    key = name.rpartition(".")[2] if isinstance(layer, Experts) else "weight"
    shape = shape_of(layer, key) if key in layer._parameters else ()
    if len(shape) < 2:
        raise UserError(f"tuner.target_modules: {name} is no matrix; name it in modules_to_save to train it")
    weight = stored(layer, key)
    *experts, rows, columns = shape
    if settings.init in ("pissa", "olora") and settings.r > min(rows, columns):
        raise UserError(
            f"tuner.r: {settings.r} is more than the {min(rows, columns)} that {name} has for {settings.init}"
        )
    sizes = {"lora_a": (*experts, settings.r, columns), "lora_b": (*experts, rows, settings.r)}
    for part, shape in sizes.items():
        add(layer, part_name(key, part), shape, weight)
        if settings.init in ("pissa", "olora"):
            add(layer, part_name(key, f"{part}_first"), shape, weight, trained=False)
    if settings.dora:
        add(layer, part_name(key, "lora_magnitude"), (*experts, rows), weight)
    layer.lora_scale, layer.lora_dropout = settings.scale, settings.dropout  # type: ignore[assignment]
    if isinstance(layer, nn.Linear) and name != "head":
        add_mixin(layer, LoRALinear)
    elif isinstance(layer, Experts):
        add_mixin(layer, LoRAExperts)
    else:
        add_mixin(layer, LoRALayer)
        override_parameter(layer, key, LoRALayer.answer)
