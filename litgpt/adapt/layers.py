"""Adapted layers: a layer of the base model with parameters added to it.

The layer's class is replaced by a subclass of it (`add_mixin`), so it keeps its name and its parameters. Where a weight
is used without the layer's own `forward`, `module.weight` becomes a property with the adapted value
(`override_parameter`), while `module.named_parameters()` still lists the base's weight under its name.
"""

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from litgpt.model.surgery import add_mixin, override_parameter

COPY_SUFFIX = "_trained"
InitValues = Iterator[tuple[str, Tensor]]


def own_parameter(module: nn.Module, name: str) -> nn.Parameter:
    """The parameter that a module stores under this name, even if an attribute overrides it."""
    parameter = module._parameters[name]
    assert parameter is not None, name
    return parameter


def is_dtensor(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor; `torch.distributed` is not for this package to import."""
    return hasattr(tensor, "full_tensor")


def gather_full(tensor: Tensor) -> Tensor:
    """The full tensor, detached; a sharded one is gathered, so all ranks call this together."""
    tensor = tensor.detach()
    return tensor.full_tensor() if is_dtensor(tensor) else tensor  # type: ignore[attr-defined]


def upcast(tensor: Tensor) -> Tensor:
    """The tensor in float32, or in its own type if that is wider."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def is_quantized(module: nn.Module, name: str) -> bool:
    """Whether a parameter holds the codes of a quantized weight."""
    return name == "weight" and hasattr(module, "dequantize_weight")


def get_base_value(module: nn.Module, name: str) -> Tensor:
    """The full value of a parameter of the base, in float32 or wider."""
    if is_quantized(module, name):
        return module.dequantize_weight(gather_full, torch.float32)  # type: ignore[operator]
    return upcast(gather_full(own_parameter(module, name)))


def get_base_dtype(module: nn.Module, name: str) -> torch.dtype:
    """The type of a parameter of the base; of a quantized weight, its type before it was quantized."""
    return module.original_dtype if is_quantized(module, name) else own_parameter(module, name).dtype  # type: ignore[return-value]


def get_base_shape(layer: nn.Module, name: str) -> tuple[int, ...]:
    """The shape of a parameter of the base; of a quantized weight, its shape before it was quantized."""
    if name == "weight" and isinstance(layer, nn.Linear):
        return layer.out_features, layer.in_features
    return tuple(own_parameter(layer, name).shape)


class AdaptedLayer(nn.Module):
    """A layer with an adapter that can be switched off; used by itself for layers with trained copies of parameters."""

    adapter_on = True

    def base_parameter(self, name: str) -> Tensor:
        """A parameter of the base to compute with, dequantized if necessary."""
        return self.dequantize_weight() if is_quantized(self, name) else own_parameter(self, name)  # type: ignore[operator]

    def merge_parameter(self, name: str) -> Tensor:
        """The full value of a parameter of the base with the adapter merged into it, in float32 or wider."""
        copy = self._parameters.get(name + COPY_SUFFIX)
        return get_base_value(self, name) if copy is None else upcast(gather_full(copy))

    @property
    def merge_error(self) -> str:
        """Why the adapter cannot be merged into the base's weights; empty if it can."""
        return ""

    def init_values(self, _settings: Any, _seed: str) -> InitValues:
        """Yield the name and the full initial value of each parameter that the adapter added.

        Args:
            _settings: the tuner's.
            _seed: text that is unique to this layer.
        """
        for name in self._parameters:
            if name.endswith(COPY_SUFFIX):
                yield name, gather_full(own_parameter(self, name.removesuffix(COPY_SUFFIX)))


def seeded_generator(seed: str) -> torch.Generator:
    """A CPU generator whose state is a function of a text."""
    digest = hashlib.sha256(seed.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big", signed=True))


def add_parameter(module: nn.Module, name: str, shape: Iterable[int], like: Tensor, *, trained: bool = True) -> None:
    """Register an uninitialized parameter with the type and device of `like`; float32 if that holds quantized codes."""
    dtype = like.dtype if like.is_floating_point() else torch.float32
    values = torch.empty(tuple(shape), dtype=dtype, device=like.device)
    module.register_parameter(name, nn.Parameter(values, requires_grad=trained))


def select_copy(module: AdaptedLayer, name: str) -> Tensor:
    """The trained copy of a parameter, or the base's parameter while the adapter is off."""
    return own_parameter(module, name + COPY_SUFFIX if module.adapter_on else name)


def add_trained_copy(module: nn.Module, name: str) -> None:
    """Add a trained copy of a parameter, which the layer computes with instead; the base's parameter stays frozen."""
    if name + COPY_SUFFIX not in module._parameters:
        add_parameter(module, name + COPY_SUFFIX, own_parameter(module, name).shape, own_parameter(module, name))
        add_mixin(module, AdaptedLayer)
        override_parameter(module, name, select_copy)


def iter_adapted_layers(model: nn.Module) -> Iterator[tuple[str, AdaptedLayer]]:
    """Every layer that has an adapter, with its name."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, AdaptedLayer))


@contextmanager
def disable_adapters(model: nn.Module) -> Iterator[None]:
    """Compute as the base model does, without its adapters."""
    layers = [layer for _, layer in iter_adapted_layers(model) if layer.adapter_on]
    for layer in layers:
        layer.adapter_on = False
    try:
        yield
    finally:
        for layer in layers:
            layer.adapter_on = True
