"""Adapted layers: a layer of the base model with parameters added to it.

The layer's class is replaced by a subclass of it (`add_mixin`), so it keeps its name and its parameters. Where a weight
is used without the layer's own `forward`, `module.weight` becomes a property with the adapted value
(`override_parameter`), while `module.named_parameters()` still lists the base's weight under its name.
"""

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


def gather_full(tensor: Tensor) -> Tensor:
    """The full tensor, detached; a sharded one is gathered, so all ranks call this together."""
    tensor = tensor.detach()  # the type DTensor is in torch.distributed, which this package does not import
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def upcast(tensor: Tensor) -> Tensor:
    """The tensor in float32, or in its own dtype if that is wider."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def gather_value(module: nn.Module, name: str) -> Tensor:
    """The full value of a parameter that a module stores, in float32 or wider."""
    return upcast(gather_full(own_parameter(module, name)))


def is_quantized(module: nn.Module, name: str) -> bool:
    """Whether a parameter stores a quantized weight."""
    return name == "weight" and hasattr(module, "dequantize_weight")


def get_base_value(module: nn.Module, name: str) -> Tensor:
    """The full value of a parameter of the base, in float32 or wider."""
    if is_quantized(module, name):
        return module.dequantize_weight(gather_full, torch.float32)  # type: ignore[operator]
    return gather_value(module, name)


def get_base_dtype(module: nn.Module, name: str) -> torch.dtype:
    """The dtype of a parameter of the base model; of a quantized weight, its dtype before quantization."""
    return module.original_dtype if is_quantized(module, name) else own_parameter(module, name).dtype  # type: ignore[return-value]


class AdaptedLayer(nn.Module):
    """A layer with an adapter that can be switched off; also the class of layers with nothing but trained copies."""

    adapter_on = True

    def base_parameter(self, name: str) -> Tensor:
        """A parameter of the base to compute with, dequantized if necessary."""
        return self.dequantize_weight() if is_quantized(self, name) else own_parameter(self, name)  # type: ignore[operator]

    def merge_parameter(self, name: str) -> Tensor:
        """The full value of a parameter of the base with the adapter merged into it, in float32 or wider."""
        copy = name + COPY_SUFFIX
        return gather_value(self, copy) if copy in self._parameters else get_base_value(self, name)

    @property
    def merge_error(self) -> str:
        """The reason why the adapter cannot be merged into the weights of the base model; empty if it can."""
        return ""

    def init_values(self, _settings: Any, _seed: str) -> InitValues:
        """Yield the name and the full initial value of each parameter that the adapter added, except trained copies.

        Args:
            _settings: the tuner's.
            _seed: text that is unique to this layer.
        """
        return iter(())


def iter_copy_values(layer: AdaptedLayer) -> InitValues:
    """Yield the name and the full initial value of each trained copy: the value of the base."""
    for name in layer._parameters:
        if name.endswith(COPY_SUFFIX):
            yield name, gather_full(own_parameter(layer, name.removesuffix(COPY_SUFFIX)))


def add_parameter(module: nn.Module, name: str, shape: Iterable[int], like: Tensor, *, trained: bool = True) -> None:
    """Register an uninitialized parameter with the dtype and device of `like`; float32 if `like` is quantized."""
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
    """Iterate over (name, layer) of the layers with an adapter."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, AdaptedLayer))


@contextmanager
def disable_adapters(model: nn.Module) -> Iterator[None]:
    """Switch off the adapters of a model within the context, so that it computes as its base model."""
    layers = [layer for _, layer in iter_adapted_layers(model) if layer.adapter_on]
    for layer in layers:
        layer.adapter_on = False
    try:
        yield
    finally:
        for layer in layers:
            layer.adapter_on = True
