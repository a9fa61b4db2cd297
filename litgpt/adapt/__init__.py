"""Tuners: what a run trains of a model and what it adds to the model; layers are changed in place, on any device."""

from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from litgpt.adapt import (
    adalora,
    boft,
    bone,
    fourierft,
    freezing,
    ia3,
    layers,
    lisa,
    llama_adapter,
    llama_pro,
    lora,
    reft,
    vera,
)
from litgpt.adapt.schedule import TunerSchedule
from litgpt.adapt.targets import get_base_names
from litgpt.errors import UserError
from litgpt.model.gpt import GPT
from litgpt.model.init import Writer, copy_into
from litgpt.recipe.tuner import (
    BOFT,
    IA3,
    LISA,
    AdaLoRA,
    Adapter,
    AdapterV2,
    Bone,
    FourierFT,
    Full,
    LLaMAPro,
    LoRA,
    ReFT,
    Tuner,
    VeRA,
)

ATTACH: dict[type[Tuner], Callable[[GPT, Any], None]] = {
    Full: freezing.freeze_parameters,
    LISA: lisa.check_lisa,
    LLaMAPro: llama_pro.freeze_base_blocks,
    LoRA: lora.attach_lora,
    AdaLoRA: adalora.attach_adalora,
    IA3: ia3.attach_ia3,
    VeRA: vera.attach_vera,
    BOFT: boft.attach_boft,
    FourierFT: fourierft.attach_fourierft,
    Bone: bone.attach_bone,
    Adapter: llama_adapter.attach_llama_adapter,
    AdapterV2: llama_adapter.attach_llama_adapter,
    ReFT: reft.attach_reft,
}


def attach(model: GPT, settings: Tuner) -> None:
    """Prepare a model, which may be on the meta device, for training with a tuner; everything else is frozen.

    Parameters of the base model keep their names; those that are added are uninitialized until `initialize_adapter`.

    Raises:
        UserError: if the settings name a layer or parameter that the model does not have.
    """
    if settings.adds:
        model.requires_grad_(False)
    ATTACH[type(settings)](model, settings)


TUNER_SCHEDULES: dict[type[Tuner], Callable[[GPT, Any, int, int | None], TunerSchedule]] = {
    LISA: lambda model, settings, seed, _steps: lisa.LISASchedule(model, settings, seed),
    AdaLoRA: lambda model, settings, _seed, steps: adalora.RankSchedule(model, settings, steps),
}


def build_schedule(model: GPT, settings: Tuner, seed: int, steps: int | None = None) -> TunerSchedule | None:
    """What a tuner does in each step of training, given the number of all steps; None if it does nothing.

    Raises:
        UserError: if it needs a number of steps, or another one.
    """
    build = TUNER_SCHEDULES.get(type(settings))
    return build(model, settings, seed, steps) if build else None


@torch.no_grad()
def initialize_adapter(model: nn.Module, settings: Tuner, seed: int, *, write: Writer = copy_into) -> None:
    """Initialize what a tuner added, each parameter as a function of the seed, its name and the base's weights.

    All ranks call this together, after the base's weights are loaded.

    Args:
        write: stores a full value into a parameter, which may be sharded.
    """
    for name, layer in layers.iter_adapted_layers(model):
        for key, value in chain(layers.iter_copy_values(layer), layer.init_values(settings, f"{seed}/{name}")):
            write(layers.own_parameter(layer, key), value)


def check_adapter(model: GPT, tensors: Mapping[str, Tensor]) -> None:
    """Compare a saved adapter with what a tuner added to a full model, which may be on the meta device.

    Args:
        tensors: full, by the names of `get_adapter_parameters`; copies may be missing.

    Raises:
        UserError: naming a tensor that only the adapter or only the model has, or whose shape differs.
    """
    parameters = get_adapter_parameters(model)
    missing = {name for name in parameters.keys() - tensors.keys() if not name.endswith(layers.COPY_SUFFIX)}
    for verb, names in (("lacks", missing), ("has", tensors.keys() - parameters.keys())):
        if names:
            raise UserError(
                f"the adapter {verb} {min(names)}, unlike the tuner's settings; use the settings it was trained with"
            )
    for name, tensor in tensors.items():
        if tensor.shape != parameters[name].shape:
            shape, expected = list(tensor.shape), list(parameters[name].shape)
            raise UserError(
                f"the adapter's {name} is {shape}, the model's {expected}; use the settings it was trained with"
            )


@torch.no_grad()
def load_adapter(model: GPT, tensors: Mapping[str, Tensor], *, write: Writer = copy_into) -> None:
    """Load an adapter that `check_adapter` accepted; copies that it lacks are initialized from the base.

    All ranks call this together, after the base's weights are loaded.

    Args:
        tensors: as for `check_adapter`; those of other pipeline stages are skipped.
        write: stores a full value into a parameter, which may be sharded.
    """
    for owner, layer in layers.iter_adapted_layers(model):
        for key, value in layers.iter_copy_values(layer):
            if f"{owner}.{key}" not in tensors:
                write(layers.own_parameter(layer, key), value)
    for name, parameter in get_adapter_parameters(model).items():
        if name in tensors:
            write(parameter, tensors[name])


def get_adapter_parameters(model: GPT) -> dict[str, nn.Parameter]:
    """The parameters that a tuner added or trains, by name."""
    base = get_base_names(model)
    for name, layer in model.named_modules():
        base.update(f"{name}.{key}" for key in getattr(layer, "quant_tensors", ()))
    named = model.named_parameters()
    return {name: parameter for name, parameter in named if parameter.requires_grad or name not in base}


@torch.no_grad()
def merge_adapter(model: GPT, dtypes: Mapping[str, torch.dtype] | None = None) -> Iterator[tuple[str, Tensor]]:
    """Yield the full parameters of the base model with the adapters merged into them, added in float32 and then cast.

    All ranks iterate together.

    Args:
        dtypes: the type of each; None for the type that it has in the model.

    Raises:
        UserError: before the first, if an adapter cannot be merged into the weights of the base model.
    """
    for name, layer in layers.iter_adapted_layers(model):
        if layer.merge_error:
            raise UserError(f"{name} cannot be merged: {layer.merge_error}; keep base and adapter separate")
    base = get_base_names(model)
    for name, _ in model.named_parameters():
        if name in base:
            owner_name, _, key = name.rpartition(".")
            owner = model.get_submodule(owner_name)
            if isinstance(owner, layers.AdaptedLayer):
                value = owner.merge_parameter(key)
            else:
                value = layers.get_base_value(owner, key)
            yield name, value.to(layers.get_base_dtype(owner, key) if dtypes is None else dtypes[name])
