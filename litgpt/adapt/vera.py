"""VeRA: one pair of frozen random matrices for all layers, and trained scales of each layer (Kopiczko et al. 2024)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from litgpt.adapt.layers import Adapted, InitValues, add, shape_of, stored, whole, widened
from litgpt.adapt.targets import linears_of, modules_known_as
from litgpt.model.gpt import GPT
from litgpt.model.surgery import add_mixin
from litgpt.recipe.tuner import VeRA


class VeRAProjections(Adapted):
    """What all layers share: `a` (r, in) and `b` (out, r), as wide as the widest layer needs them."""

    def init_values(self, settings: VeRA, seed: str) -> InitValues:
        """Uniform within sqrt(6 / inputs), drawn as PEFT draws them."""
        draw = torch.Generator().manual_seed(settings.projection_seed)
        for key in ("a", "b"):
            shape = stored(self, key).shape
            bound = math.sqrt(6 / shape[1])
            yield key, torch.empty(shape).uniform_(-bound, bound, generator=draw)


class VeRALinear(Adapted):
    """A linear layer that is W x + b + scale_b * (B (scale_d * (A x))), where A and B are the projections.

    Its added parameters are `vera_scale_d` (r,) and `vera_scale_b` (out,).
    """

    vera_dropout: float
    vera_pair: list[VeRAProjections]  # in a list, so that they are no part of each layer
    in_features: int
    out_features: int

    def pair(self) -> tuple[Tensor, Tensor]:
        """A (r, in) and B (out, r), cut to this layer."""
        a, b = (stored(self.vera_pair[0], key) for key in ("a", "b"))
        return a[:, : self.in_features], b[: self.out_features]

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        if not self.adapter_on:
            return y
        a, b = self.pair()
        seen = F.dropout(x, self.vera_dropout, self.training)
        seen = seen if torch.is_autocast_enabled(x.device.type) else seen.to(a.dtype)
        update = stored(self, "vera_scale_b") * F.linear(stored(self, "vera_scale_d") * F.linear(seen, a), b)
        return y + update.to(y.dtype)

    def merged(self, name: str) -> Tensor:
        value = super().merged(name)
        if name != "weight":
            return value
        a, b = (widened(whole(stored(self.vera_pair[0], key))) for key in ("a", "b"))
        scale_d, scale_b = (widened(whole(stored(self, key))) for key in ("vera_scale_d", "vera_scale_b"))
        return value + (scale_b[:, None] * b[: self.out_features]) @ (scale_d[:, None] * a[:, : self.in_features])

    def init_values(self, settings: VeRA, seed: str) -> InitValues:
        yield from super().init_values(settings, seed)
        yield "vera_scale_d", torch.full(stored(self, "vera_scale_d").shape, settings.d_initial)
        yield "vera_scale_b", torch.zeros(stored(self, "vera_scale_b").shape)


def attach(model: GPT, settings: VeRA) -> None:
    """Give the model a pair of projections, and the layers that the settings name their scales.

    Raises:
        UserError: for a name that stands for nothing, or for something that is no linear layer.
    """
    targets = linears_of(model, modules_known_as(model), settings.target_modules)
    shapes = [shape_of(layer, "weight") for _, layer in targets]
    like = stored(targets[0][1], "weight")
    pair = VeRAProjections()
    add(pair, "a", (settings.r, max(shape[1] for shape in shapes)), like, trained=False)
    add(pair, "b", (max(shape[0] for shape in shapes), settings.r), like, trained=False)
    model.add_module("projections", pair)
    for _, layer in targets:
        add(layer, "vera_scale_d", (settings.r,), like)
        add(layer, "vera_scale_b", (layer.out_features,), like)
        layer.vera_dropout, layer.vera_pair = settings.dropout, [pair]  # type: ignore[assignment]
        add_mixin(layer, VeRALinear)
