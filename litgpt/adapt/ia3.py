"""Tuners that scale what goes into and comes out of linear layers: IA3 (Liu et al. 2022) and part of Adapter v2."""

import torch
from torch import Tensor, nn

from litgpt.adapt.layers import Adapted, InitValues, add, stored, train_copy, whole, widened
from litgpt.adapt.targets import found_by_ending, linears_of, modules_known_as
from litgpt.errors import UserError
from litgpt.model.gpt import GPT
from litgpt.model.surgery import add_mixin, override_parameter
from litgpt.recipe.tuner import IA3, Tuner


class Scaled(Adapted):
    """A linear layer that is out * (W (in * x) + b + shift).

    Its added parameters are those of `scale_in` (in,), `scale_out` (out,) and `shift` (out,) that it needs.
    """

    def part(self, key: str, start: float) -> Tensor | float:
        """One of the parameters above, or the number that changes nothing."""
        parameter = self._parameters.get(key)
        return start if parameter is None or not self.adapter_on else parameter

    def refusal(self) -> str:
        """Without a bias, the base has no place for a shift."""
        return "its shift has no place in a layer without bias" if self._lacks_bias() else ""

    def _lacks_bias(self) -> bool:
        return self._parameters.get("shift") is not None and self._parameters.get("bias") is None

    def merged(self, name: str) -> Tensor:
        def part(key: str) -> Tensor | None:
            parameter = self._parameters.get(key)
            return None if parameter is None else widened(whole(parameter))

        value = super().merged(name)
        scale_in, scale_out, shift = map(part, ("scale_in", "scale_out", "shift"))
        if name == "weight":
            value = value if scale_in is None else value * scale_in
            return value if scale_out is None else value * scale_out[:, None]
        value = value if shift is None else value + shift
        return value if scale_out is None else value * scale_out

    def init_values(self, settings: Tuner, seed: str) -> InitValues:
        yield from super().init_values(settings, seed)
        for key, start in (("scale_in", torch.ones), ("scale_out", torch.ones), ("shift", torch.zeros)):
            if self._parameters.get(key) is not None:
                yield key, start(stored(self, key).shape)

    def answer(self, name: str) -> Tensor | None:
        """The weight or the bias to compute with, where the layer's input cannot be seen."""
        scale = self.part("scale_out", 1.0)
        if name == "weight":
            return self.frozen(name) * (scale[:, None] if isinstance(scale, Tensor) else scale)
        bias = self._parameters["bias"]
        if not self.adapter_on:
            return bias
        return scale * (self.part("shift", 0.0) + (0.0 if bias is None else bias))  # type: ignore[return-value]


class ScaledLinear(Scaled):
    """A linear layer of a block, scaled as it computes."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward((x * self.part("scale_in", 1.0)).to(x.dtype))
        return ((y + self.part("shift", 0.0)) * self.part("scale_out", 1.0)).to(y.dtype)


def attach_ia3(model: GPT, settings: IA3) -> None:
    """Scale the inputs of feed-forward layers and the outputs of others.

    Raises:
        UserError: for a name that stands for nothing, or for something that is no linear layer.
    """
    known = modules_known_as(model)
    inward = found_by_ending("tuner.feedforward_modules", settings.feedforward_modules, known)
    targets = linears_of(model, known, settings.target_modules)
    if stray := sorted(inward - {name for name, _ in targets}):
        raise UserError(f"tuner.feedforward_modules: {stray[0]} is not among the target_modules; name it there too")
    for name, layer in targets:
        weight = stored(layer, "weight")
        key, size = ("scale_in", layer.in_features) if name in inward else ("scale_out", layer.out_features)
        add(layer, key, (size,), weight)
        add_mixin(layer, ScaledLinear)


def attach_scales_and_shifts(model: GPT) -> None:
    """Scale and shift what comes out of every linear layer and of the head; train copies of all norms (Adapter v2)."""
    for name, layer in model.named_modules():
        last = name.rpartition(".")[2]
        if last.startswith("norm"):
            for key in [key for key, value in layer._parameters.items() if value is not None]:
                train_copy(layer, key)
        if isinstance(layer, nn.Linear):
            weight = stored(layer, "weight")
            for key in ("scale_out", "shift"):
                add(layer, key, (layer.out_features,), weight)
            if name == "head":
                add_mixin(layer, Scaled)
                override_parameter(layer, "weight", Scaled.answer)
                override_parameter(layer, "bias", Scaled.answer)
            else:
                add_mixin(layer, ScaledLinear)
