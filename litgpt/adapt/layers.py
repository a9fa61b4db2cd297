"""What adapted layers have in common: they are the layers that they were, with parameters added.

A layer's class becomes a subclass of what it was, so that it keeps its name, its parameters and theirs. A subclass may
answer for a parameter with other numbers than those it holds: `module.weight` is then a property, while
`module.named_parameters()` goes on to list the stored weight under its name.
"""

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from litgpt.model.surgery import add_mixin, override_parameter

COPY = "_trained"
InitValues = Iterator[tuple[str, Tensor]]


def stored(module: nn.Module, name: str) -> nn.Parameter:
    """A module's own parameter, whatever the module answers for it."""
    parameter = module._parameters[name]
    assert parameter is not None, name
    return parameter


def is_spread(tensor: Tensor) -> bool:
    """Whether a tensor is spread over ranks: a DTensor, whose package is not for this room to import."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """A tensor in full, gathered if it is spread over ranks, without gradient."""
    tensor = tensor.detach()
    return tensor.full_tensor() if is_spread(tensor) else tensor  # type: ignore[attr-defined]


def widened(tensor: Tensor) -> Tensor:
    """A tensor in float32, or wider if it is."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def is_quantized(module: nn.Module, name: str) -> bool:
    """Whether a parameter is the main piece of a packed weight."""
    return name == "weight" and hasattr(module, "dequantize_weight")


def base_value(module: nn.Module, name: str) -> Tensor:
    """A parameter of the base in full, in float32 at least."""
    if is_quantized(module, name):
        return module.dequantize_weight(whole, torch.float32)  # type: ignore[operator]
    return widened(whole(stored(module, name)))


def type_of(module: nn.Module, name: str) -> torch.dtype:
    """The type of a parameter of the base, before it was packed."""
    return module.original_dtype if is_quantized(module, name) else stored(module, name).dtype  # type: ignore[return-value]


def shape_of(layer: nn.Module, name: str) -> tuple[int, ...]:
    """The shape of a parameter of the base, before it was packed."""
    if name == "weight" and isinstance(layer, nn.Linear):
        return layer.out_features, layer.in_features
    return tuple(stored(layer, name).shape)


class Adapted(nn.Module):
    """A layer with an adapter, which can be switched off; by itself one that adds trained copies of parameters."""

    adapter_on = True

    def frozen(self, name: str) -> Tensor:
        """A parameter of the base to compute with."""
        return self.dequantize_weight() if is_quantized(self, name) else stored(self, name)  # type: ignore[operator]

    def base(self, name: str) -> Tensor:
        """A parameter of the base in full, in float32 at least."""
        return base_value(self, name)

    def merged(self, name: str) -> Tensor:
        """A parameter of the base in full with the adapter merged in, in float32 at least."""
        copy = self._parameters.get(name + COPY)
        return self.base(name) if copy is None else widened(whole(copy))

    def refusal(self) -> str:
        """Why the adapter cannot be merged into the base, if it cannot."""
        return ""

    def init_values(self, settings: Any, seed: str) -> InitValues:
        """The name and the whole first value of each parameter that the adapter added.

        Args:
            seed: text that no other layer has.
        """
        for name in self._parameters:
            if name.endswith(COPY):
                yield name, whole(stored(self, name.removesuffix(COPY)))


def generator(seed: str) -> torch.Generator:
    """A generator on the CPU that is a function of a text."""
    digest = hashlib.sha256(seed.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big", signed=True))


def add(module: nn.Module, name: str, shape: Iterable[int], like: Tensor, *, trained: bool = True) -> None:
    """Give a module one more parameter, of the type and on the device of `like`."""
    dtype = like.dtype if like.is_floating_point() else torch.float32
    values = torch.empty(tuple(shape), dtype=dtype, device=like.device)
    module.register_parameter(name, nn.Parameter(values, requires_grad=trained))


def trained_copy(module: Adapted, name: str) -> Tensor:
    """The trained copy of a parameter, or the parameter itself while the adapter is off."""
    return stored(module, name + COPY if module.adapter_on else name)


def train_copy(module: nn.Module, name: str) -> None:
    """Let a layer compute with a trained copy of its parameter of this name, which itself stays as it is."""
    if name + COPY not in module._parameters:
        add(module, name + COPY, stored(module, name).shape, stored(module, name))
        add_mixin(module, Adapted)
        override_parameter(module, name, trained_copy)


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, Adapted]]:
    """Every layer that has an adapter, by name."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, Adapted))


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """The base model, without what its adapters do."""
    layers = [layer for _, layer in adapted_layers(model) if layer.adapter_on]
    for layer in layers:
        layer.adapter_on = False
    try:
        yield
    finally:
        for layer in layers:
            layer.adapter_on = True
