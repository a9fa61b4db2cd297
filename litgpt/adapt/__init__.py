"""Tuners: what a run trains of a model, and what it adds to that end; layers are changed in place, on any device."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from litgpt.adapt import boft, freezing, ia3, lisa, llama_adapter, llama_pro, lora, reft, vera
from litgpt.adapt.layers import COPY, Adapted, adapted_layers, base_value, disabled, stored, type_of
from litgpt.adapt.targets import base_names
from litgpt.errors import UserError
from litgpt.model.config import Config
from litgpt.model.gpt import GPT
from litgpt.model.init import copy_into
from litgpt.recipe.tuner import BOFT, IA3, LISA, Adapter, AdapterV2, Full, LLaMAPro, LoRA, ReFT, Tuner, VeRA

__all__ = [
    "adapted_layers",
    "adapter_tensors",
    "attach",
    "build_schedule",
    "check",
    "disabled",
    "fill",
    "initialize",
    "merged",
]

ATTACH: dict[type[Tuner], Callable[[GPT, Any], None]] = {
    Full: freezing.attach,
    LISA: lisa.check_lisa,
    LLaMAPro: llama_pro.attach,
    LoRA: lora.attach,
    IA3: ia3.attach_ia3,
    VeRA: vera.attach,
    BOFT: boft.attach,
    Adapter: llama_adapter.attach,
    AdapterV2: llama_adapter.attach,
    ReFT: reft.attach,
}


def attach(model: GPT, settings: Tuner) -> None:
    """Make a model, which may be on the meta device, one that is trained as the settings say; the rest is frozen.

    The base's parameters keep their names. What is added has no values before `initialize`.

    Raises:
        UserError: if the settings name what the model has not.
    """
    if settings.adds:
        model.requires_grad_(False)
    ATTACH[type(settings)](model, settings)


def shape_for(settings: Tuner, config: Config) -> Config:
    """The shape of the model that is trained, out of its base's.

    Raises:
        UserError: if what the settings add to it cannot be.
    """
    return llama_pro.grown(config, settings) if isinstance(settings, LLaMAPro) else config


@torch.no_grad()
def initialize(
    model: nn.Module, settings: Tuner, seed: int, *, write: Callable[[nn.Parameter, Tensor], None] = copy_into
) -> None:
    """Give what a tuner added its first values, each a function of the seed, its name and the base's weights.

    All ranks call it together, after the base's weights are there.

    Args:
        write: stores a whole value into a parameter, which may be a shard.
    """
    for name, layer in adapted_layers(model):
        for key, value in layer.init_values(settings, f"{seed}/{name}"):
            write(stored(layer, key), value)


def check(model: GPT, tensors: Mapping[str, Tensor]) -> None:
    """Hold an adapter that was saved against what a tuner added to a whole model, which may be on the meta device.

    Args:
        tensors: whole, by the names of `adapter_tensors`; copies may be missing.

    Raises:
        UserError: naming a tensor that only the adapter or only the model has, or of another shape.
    """
    parameters = adapter_tensors(model)
    missing = {name for name in parameters.keys() - tensors.keys() if not name.endswith(COPY)}
    for what, names in (("lacks", missing), ("has", tensors.keys() - parameters.keys())):
        if names:
            raise UserError(
                f"the adapter {what} {min(names)}, against the tuner's settings; use those it was made with"
            )
    for name, tensor in tensors.items():
        if tensor.shape != parameters[name].shape:
            here, there = list(tensor.shape), list(parameters[name].shape)
            raise UserError(f"the adapter's {name} is {here}, the model's {there}; use the settings it was made with")


@torch.no_grad()
def fill(
    model: GPT,
    tensors: Mapping[str, Tensor],
    *,
    write: Callable[[nn.Parameter, Tensor], None] = copy_into,
) -> None:
    """Give what a tuner added the values of an adapter that `check` found to fit; copies that it lacks are the base's.

    All ranks call it together, after the base's weights are there.

    Args:
        tensors: those of `check`; the ones that lie in another process are passed over.
        write: stores a whole value into a parameter, which may be a shard.
    """
    for owner, layer in adapted_layers(model):
        for key, value in Adapted.init_values(layer, None, owner):
            if f"{owner}.{key}" not in tensors:
                write(stored(layer, key), value)
    for name, parameter in adapter_tensors(model).items():
        if name in tensors:
            write(parameter, tensors[name])


def adapter_tensors(model: GPT) -> dict[str, nn.Parameter]:
    """What the tuner added, or trains, by name."""
    base = base_names(model)
    for name, layer in model.named_modules():
        base.update(f"{name}.{piece}" for piece in getattr(layer, "quant_tensors", ()))
    named = model.named_parameters()
    return {name: parameter for name, parameter in named if parameter.requires_grad or name not in base}


@torch.no_grad()
def merged(model: GPT, types: Mapping[str, torch.dtype] | None = None) -> Iterator[tuple[str, Tensor]]:
    """Every parameter of the base in full, with what the adapters change merge_update in: summed in float32, then cast.

    All ranks iterate together.

    Args:
        types: what each is cast to; None for the type that it has in the model.

    Raises:
        UserError: before the first, if the base has no place for what an adapter does.
    """
    for name, layer in adapted_layers(model):
        if why := layer.refusal():
            raise UserError(f"{name} cannot be merged: {why}; keep base and adapter apart")
    base = base_names(model)
    for name, _ in model.named_parameters():
        if name in base:
            owner, _, key = name.rpartition(".")
            holder = model.get_submodule(owner)
            value = holder.merged(key) if isinstance(holder, Adapted) else base_value(holder, key)
            yield name, value.to(type_of(holder, key) if types is None else types[name])


def build_schedule(model: GPT, settings: Tuner, seed: int) -> lisa.LISASchedule | None:
    """The schedule of a tuner that trains different blocks at different steps; None if it always trains the same."""
    return lisa.LISASchedule(model, settings, seed) if isinstance(settings, LISA) else None
