"""Trained scales and shifts of linear layers: IA3 (Liu et al. 2022) and part of LLaMA-Adapter v2 (Gao et al. 2023)."""

import torch
from torch import Tensor, nn

from litgpt.adapt.layers import AdaptedLayer, InitValues, add_parameter, add_trained_copy, gather_value, own_parameter
from litgpt.adapt.targets import OUTPUT_LAYERS, find_by_suffix, find_linears, get_module_aliases, is_prediction
from litgpt.errors import UserError
from litgpt.model.gpt import GPT
from litgpt.model.surgery import add_mixin, override_parameter
from litgpt.recipe.tuner import IA3


class ScaledLayer(AdaptedLayer):
    """A linear layer that computes scale_out * (W (scale_in * x) + b + shift).

    Its added parameters are those of `scale_in` (in,), `scale_out` (out,) and `shift` (out,) that it needs.
    """

    def get_scale(self, key: str, default: float) -> Tensor | float:
        """One of the parameters above, or the default if the layer lacks it or the adapter is off."""
        return own_parameter(self, key) if self.adapter_on and key in self._parameters else default

    @property
    def merge_error(self) -> str:
        """A shift is merged into the bias, which the layer may lack."""
        lacks_bias = "shift" in self._parameters and self._parameters.get("bias") is None
        return "the layer has no bias to merge its shift into" if lacks_bias else ""

    def merge_parameter(self, name: str) -> Tensor:
        """The scaled weight, or the shifted and scaled bias."""
        value = super().merge_parameter(name)
        for key in ("scale_in", "scale_out") if name == "weight" else ("shift", "scale_out"):
            if key in self._parameters:
                change = gather_value(self, key)
                change = change[:, None] if name == "weight" and key == "scale_out" else change
                value = value + change if key == "shift" else value * change
        return value

    def init_values(self, _settings: IA3, _seed: str) -> InitValues:
        """All scales are one and all shifts zero."""
        for key, create in (("scale_in", torch.ones), ("scale_out", torch.ones), ("shift", torch.zeros)):
            if key in self._parameters:
                yield key, create(own_parameter(self, key).shape)

    def adapt_parameter(self, name: str) -> Tensor | None:
        """The weight or the bias with scale and shift applied, for code that does not call the layer's `forward`."""
        scale = self.get_scale("scale_out", 1.0)
        if name == "weight":
            return self.base_parameter(name) * (scale[:, None] if isinstance(scale, Tensor) else scale)
        bias = self._parameters["bias"]
        if not self.adapter_on:
            return bias
        return scale * (self.get_scale("shift", 0.0) + (0.0 if bias is None else bias))  # type: ignore[return-value]


class ScaledLinear(ScaledLayer):
    """A linear layer of a block, whose input and output are scaled."""

    def forward(self, x: Tensor) -> Tensor:
        """The output of the layer with its inputs or outputs scaled; (..., in) -> (..., out)."""
        y = super().forward((x * self.get_scale("scale_in", 1.0)).to(x.dtype))
        return ((y + self.get_scale("shift", 0.0)) * self.get_scale("scale_out", 1.0)).to(y.dtype)


def attach_ia3(model: GPT, settings: IA3) -> None:
    """Scale the inputs of feed-forward layers and the outputs of other layers.

    Raises:
        UserError: if a name matches no linear layer.
    """
    aliases = get_module_aliases(model)
    feedforward = find_by_suffix("tuner.feedforward_modules", settings.feedforward_modules, aliases)
    targets = find_linears(model, aliases, settings.target_modules)
    if extra := sorted(feedforward - {name for name, _ in targets}):
        raise UserError(f"tuner.feedforward_modules: {extra[0]} is not in target_modules; add it")
    for name, layer in targets:
        key, size = ("scale_in", layer.in_features) if name in feedforward else ("scale_out", layer.out_features)
        add_parameter(layer, key, (size,), own_parameter(layer, "weight"))
        add_mixin(layer, ScaledLinear)


def attach_scales_and_shifts(model: GPT) -> None:
    """Scale and shift the output of every linear layer and of the head; train copies of all norms (Adapter v2)."""
    for name, layer in model.named_modules():
        if is_prediction(model, name):
            continue
        if name.rpartition(".")[2].startswith("norm"):
            for key, _ in list(layer.named_parameters(recurse=False)):
                add_trained_copy(layer, key)
        if isinstance(layer, nn.Linear):
            for key in ("scale_out", "shift"):
                add_parameter(layer, key, (layer.out_features,), own_parameter(layer, "weight"))
            if name in OUTPUT_LAYERS:
                add_mixin(layer, ScaledLayer)
                for key in ("weight", "bias"):
                    override_parameter(layer, key, ScaledLayer.adapt_parameter)
            else:
                add_mixin(layer, ScaledLinear)
