"""VeRA: one pair of frozen random matrices for all layers, and trained scales of each layer (Kopiczko et al. 2024)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from litgpt.adapt.layers import AdaptedLayer, InitValues, add_parameter, gather_value, own_parameter
from litgpt.adapt.targets import find_linears, get_module_aliases
from litgpt.model.gpt import GPT
from litgpt.model.surgery import add_mixin
from litgpt.recipe.tuner import VeRA


class VeRAProjections(AdaptedLayer):
    """The matrices that all layers share: `a` (r, in) and `b` (out, r), as large as the largest layer needs them."""

    def init_values(self, settings: VeRA, _seed: str) -> InitValues:
        """Uniform within sqrt(6 / inputs), drawn as PEFT draws them."""
        rng = torch.Generator().manual_seed(settings.projection_seed)
        for key in ("a", "b"):
            shape = own_parameter(self, key).shape
            bound = math.sqrt(6 / shape[1])
            yield key, torch.empty(shape).uniform_(-bound, bound, generator=rng)


class VeRALinear(AdaptedLayer):
    """A linear layer that computes W x + b + scale_b * (B (scale_d * (A x))), where A and B are the projections.

    Its added parameters are `vera_scale_d` (r,) and `vera_scale_b` (out,).
    """

    vera_dropout: float
    vera_projections: list[VeRAProjections]  # in a list, so that they are not registered in each layer
    in_features: int
    out_features: int

    @classmethod
    def from_linear(cls, layer: nn.Linear, projections: VeRAProjections, settings: VeRA) -> None:
        """Convert a layer in place."""
        like = own_parameter(projections, "a")
        add_parameter(layer, "vera_scale_d", (settings.r,), like)
        add_parameter(layer, "vera_scale_b", (layer.out_features,), like)
        layer.vera_dropout, layer.vera_projections = settings.dropout, [projections]  # type: ignore[assignment]
        add_mixin(layer, cls)

    def forward(self, x: Tensor) -> Tensor:
        """The output of the layer plus its update; (..., in) -> (..., out)."""
        y = super().forward(x)
        if not self.adapter_on:
            return y
        projections = self.vera_projections[0]
        a = own_parameter(projections, "a")[:, : self.in_features]
        b = own_parameter(projections, "b")[: self.out_features]
        inputs = F.dropout(x, self.vera_dropout, self.training)
        inputs = inputs if torch.is_autocast_enabled(x.device.type) else inputs.to(a.dtype)
        scale_d, scale_b = own_parameter(self, "vera_scale_d"), own_parameter(self, "vera_scale_b")
        return y + (scale_b * F.linear(scale_d * F.linear(inputs, a), b)).to(y.dtype)

    def merge_parameter(self, name: str) -> Tensor:
        """The weight plus the update; the bias is the base's."""
        value = super().merge_parameter(name)
        if name != "weight":
            return value
        a, b = (gather_value(self.vera_projections[0], key) for key in ("a", "b"))
        scale_d, scale_b = (gather_value(self, key) for key in ("vera_scale_d", "vera_scale_b"))
        return value + (scale_b[:, None] * b[: self.out_features]) @ (scale_d[:, None] * a[:, : self.in_features])

    def init_values(self, settings: VeRA, _seed: str) -> InitValues:
        """The output scales are zero, so the layer starts as the base's."""
        yield "vera_scale_d", torch.full(own_parameter(self, "vera_scale_d").shape, settings.d_initial)
        yield "vera_scale_b", torch.zeros(own_parameter(self, "vera_scale_b").shape)


def attach_vera(model: GPT, settings: VeRA) -> None:
    """Add a pair of projections to the model, and scales to the layers that the settings name.

    Raises:
        UserError: if a name matches no linear layer.
    """
    layers = [layer for _, layer in find_linears(model, get_module_aliases(model), settings.target_modules)]
    like = own_parameter(layers[0], "weight")
    projections = VeRAProjections()
    add_parameter(projections, "a", (settings.r, max(layer.in_features for layer in layers)), like, trained=False)
    add_parameter(projections, "b", (max(layer.out_features for layer in layers), settings.r), like, trained=False)
    model.add_module("projections", projections)
    for layer in layers:
        VeRALinear.from_linear(layer, projections, settings)
