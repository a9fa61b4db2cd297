"""AdaLoRA: low-rank updates in the form of an SVD, of which the least important ranks are pruned (Zhang et al. 2023).

Axes: in and out, the sizes of a layer; r, the initial rank of its update.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from litgpt.adapt.layers import (
    AdaptedLayer,
    InitValues,
    add_parameter,
    gather_full,
    gather_value,
    iter_adapted_layers,
    own_parameter,
    upcast,
)
from litgpt.adapt.lora import lora_down
from litgpt.adapt.schedule import TunerSchedule
from litgpt.adapt.targets import find_linears, get_module_aliases
from litgpt.errors import UserError
from litgpt.model.gpt import GPT
from litgpt.model.init import Writer, seeded_generator
from litgpt.model.surgery import add_mixin
from litgpt.recipe.tuner import AdaLoRA

IMPORTANCE, UNCERTAINTY, MASK = "tuner_importance", "tuner_uncertainty", "tuner_mask"
"""The keys of the state of a parameter: means of sensitivity and of its changes, and the singular values that are kept.
"""
EPS = 1e-5  # which PEFT and the authors' code add to the rank


class AdaLoRALinear(AdaptedLayer):
    """A linear layer that computes W x + s P (e * (Q x)) + b.

    Its added parameters are `lora_a` (r, in), which is Q, `lora_e` (r,), the singular values, and `lora_b` (out, r),
    which is P.
    """

    lora_scale: float
    lora_dropout: float

    @classmethod
    def from_linear(cls, layer: nn.Linear, settings: AdaLoRA) -> None:
        """Convert a layer in place."""
        rank = settings.init_r
        shapes = {"lora_a": (rank, layer.in_features), "lora_e": (rank,), "lora_b": (layer.out_features, rank)}
        for key, shape in shapes.items():
            add_parameter(layer, key, shape, own_parameter(layer, "weight"))
        layer.lora_scale = settings.alpha / (rank + EPS)  # type: ignore[assignment]
        layer.lora_dropout = settings.dropout  # type: ignore[assignment]
        add_mixin(layer, cls)

    def forward(self, x: Tensor) -> Tensor:
        """The output of the layer plus its update; (..., in) -> (..., out)."""
        y = super().forward(x)
        if not self.adapter_on:
            return y
        a, e, b = (own_parameter(self, key) for key in ("lora_a", "lora_e", "lora_b"))
        down = lora_down(x, a, self.lora_dropout if self.training else 0.0)
        return y + (self.lora_scale * F.linear(down * e.to(down.dtype), b)).to(y.dtype)

    def merge_parameter(self, name: str) -> Tensor:
        """The weight plus its update; the bias is the base's."""
        value = super().merge_parameter(name)
        if name != "weight":
            return value
        a, e, b = (gather_value(self, key) for key in ("lora_a", "lora_e", "lora_b"))
        return value + self.lora_scale * (b * e) @ a

    def init_values(self, _settings: AdaLoRA, seed: str) -> InitValues:
        """Normal P and Q, and singular values of zero, so the layer starts as the base's."""
        for key in ("lora_a", "lora_b"):
            value = torch.empty(own_parameter(self, key).shape)
            yield key, value.normal_(0, 0.02, generator=seeded_generator(f"{seed}/{key}"))
        yield "lora_e", torch.zeros(own_parameter(self, "lora_e").shape)


def attach_adalora(model: GPT, settings: AdaLoRA) -> None:
    """Add an update to the layers that the settings name.

    Raises:
        UserError: if a name matches no linear layer.
    """
    for _, layer in find_linears(model, get_module_aliases(model), settings.target_modules):
        AdaLoRALinear.from_linear(layer, settings)


class Triplets(NamedTuple):
    """The parameters of one layer's update, as in `AdaLoRALinear`."""

    a: nn.Parameter
    e: nn.Parameter
    b: nn.Parameter


class RankSchedule(TunerSchedule):
    """Keeps P and Q near orthonormal, and prunes the singular values of all layers to a falling budget (algorithm 1).

    As in the authors' code and in PEFT, the sensitivity of a parameter is |w dL/dw| with its value after the step.
    """

    def __init__(self, model: GPT, settings: AdaLoRA, steps: int | None) -> None:
        """Record the parameters of the updates.

        Args:
            steps: of the whole run, unless the settings have a number; None if it has no limit on steps.

        Raises:
            UserError: if there are no steps in which ranks are allocated.
        """
        steps = settings.total_steps or steps
        if steps is None:
            raise UserError("tuner: AdaLoRA allocates ranks over a number of steps; set tuner.total_steps")
        if settings.tinit + settings.tfinal >= steps:
            raise UserError(
                f"tuner.tinit: {settings.tinit} and tuner.tfinal: {settings.tfinal} leave none of {steps} steps to "
                "allocate ranks; lower one of them, or raise tuner.total_steps"
            )
        self.settings, self.steps, self.step = settings, steps, 0
        layers = [layer for _, layer in iter_adapted_layers(model) if isinstance(layer, AdaLoRALinear)]
        self.layers = [Triplets(*(own_parameter(layer, f"lora_{key}") for key in "aeb")) for layer in layers]

    def begin_step(self, step: int) -> list[nn.Parameter]:
        """Note the number of the step."""
        self.step = step
        return []

    def compute_budget(self) -> int:
        """The number of singular values of all layers together that are kept in this step (eq. 12)."""
        settings, number = self.settings, len(self.layers)
        first, last = settings.init_r * number, settings.target_r * number
        if self.step <= settings.tinit:
            return first
        end = self.steps - settings.tfinal
        remaining = max(0.0, 1 - (self.step - settings.tinit) / (end - settings.tinit))
        return int((first - last) * remaining**3 + last)

    @torch.no_grad()
    def add_gradients(self, write: Writer) -> None:
        """Add the gradient of the weighted mean of ||P^T P - I|| and ||Q Q^T - I|| over all layers (eq. 4)."""
        factor = self.settings.orth_reg_weight / (2 * len(self.layers))
        for triplets in self.layers if factor else ():
            for parameter, transposed in ((triplets.a, False), (triplets.b, True)):
                value = upcast(gather_full(parameter))
                gradient = compute_orthogonality_gradient(value.mT if transposed else value) * factor
                added = torch.empty_like(parameter)
                write(added, (gradient.mT if transposed else gradient).to(parameter.dtype))
                parameter.grad = added if parameter.grad is None else parameter.grad.add_(added)

    @torch.no_grad()
    def end_step(self, optimizers: Sequence[torch.optim.Optimizer], write: Writer) -> dict[str, float]:
        """Update the importance of each singular value with its vectors, and set the least important ones to zero."""
        settings, end = self.settings, self.steps - self.settings.tfinal
        states: dict[Tensor, dict[str, Any]] = {
            parameter: optimizer.state[parameter]
            for optimizer in optimizers
            for group in optimizer.param_groups
            for parameter in group["params"]
        }
        for parameter in (p for triplets in self.layers for p in triplets):
            if self.step < end:
                update_importance(states[parameter], parameter, settings)
        is_final = self.step >= end and not all(MASK in states[triplets.e] for triplets in self.layers)
        if is_final or (settings.tinit < self.step < end and self.step % settings.delta_t == 0):
            for triplets, mask in zip(self.layers, self.choose_ranks(states), strict=True):
                stored = torch.empty_like(triplets.e)
                write(stored, mask.to(stored.dtype))
                triplets.e.mul_(stored)
                if is_final:
                    states[triplets.e][MASK] = stored
        if self.step >= end:
            for triplets in self.layers:
                triplets.e.mul_(states[triplets.e][MASK])
                for parameter in triplets:
                    for key in (IMPORTANCE, UNCERTAINTY):
                        states[parameter].pop(key, None)
        return {"adalora/rank": self.compute_budget() / len(self.layers)}

    def choose_ranks(self, states: Mapping[Tensor, Mapping[str, Any]]) -> list[Tensor]:
        """Whether each singular value (r,) of each layer is kept: those whose score is among the highest of all."""
        layer_scores = [compute_rank_scores(triplets, states) for triplets in self.layers]
        scores = [score for score in layer_scores if score is not None]
        if len(scores) < len(layer_scores):  # after a checkpoint without optimizer state; the pruned ones are zeros
            return [gather_full(triplets.e).ne(0) for triplets in self.layers]
        pruned = self.settings.init_r * len(self.layers) - self.compute_budget()
        if not pruned:
            return [torch.ones_like(score, dtype=torch.bool) for score in scores]
        threshold = torch.cat(scores).kthvalue(pruned).values
        return [score > threshold for score in scores]


def compute_orthogonality_gradient(rows: Tensor) -> Tensor:
    """The gradient of the Frobenius norm of R R^T - I with respect to rows R (r, n); zero where the norm is."""
    difference = rows @ rows.mT - torch.eye(len(rows), dtype=rows.dtype, device=rows.device)
    norm = torch.linalg.matrix_norm(difference)
    return 2 * difference @ rows / norm.clamp(min=torch.finfo(rows.dtype).tiny)


def update_importance(state: dict[str, Any], parameter: Tensor, settings: AdaLoRA) -> None:
    """Update the means of the sensitivity of each value and of its distance to its mean (eq. 9 and 10)."""
    if parameter.grad is None:
        return
    sensitivity = (parameter.detach() * parameter.grad).abs_()
    for key in (IMPORTANCE, UNCERTAINTY):
        if key not in state:
            state[key] = torch.zeros_like(sensitivity)
    state[IMPORTANCE].lerp_(sensitivity, 1 - settings.beta1)
    state[UNCERTAINTY].lerp_((sensitivity - state[IMPORTANCE]).abs_(), 1 - settings.beta2)


def compute_rank_scores(triplets: Triplets, states: Mapping[Tensor, Mapping[str, Any]]) -> Tensor | None:
    """The score (r,) of each singular value: its own, and the means over its two vectors (eq. 7, 8 and 11).

    None if no sensitivities are known.
    """
    if any(IMPORTANCE not in states[parameter] for parameter in triplets):
        return None
    total = torch.zeros(())
    for parameter, dim in zip(triplets, (1, None, 0), strict=True):
        score = states[parameter][IMPORTANCE] * states[parameter][UNCERTAINTY]
        total = total + gather_full(score if dim is None else score.sum(dim)).cpu() / (
            1 if dim is None else parameter.shape[dim]
        )
    return total
