"""Convert tuners other than LoRA to PEFT's format and from it: names and shapes of tensors, and keys of the config."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from litgpt.errors import UserError
from litgpt.model.config import Config
from litgpt.recipe.tuner import BOFT, IA3, Tuner, VeRA
from litgpt.store.adapters.lora_pairs import strip_ending
from litgpt.store.adapters.peft_lora import PREFIX, list_published_mappings

Reshape = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class PEFTTuner:
    """PEFT's format of a tuner.

    Attributes:
        keys: our parameter of a layer to PEFT's, and how PEFT's tensor is shaped.
        settings: our setting to PEFT's.
        shared: our parameters that all layers share to PEFT's.
        constants: further keys of PEFT's config.
    """

    peft_type: str
    settings_class: type[Tuner]
    keys: Mapping[str, tuple[str, Reshape]]
    settings: Mapping[str, str]
    shared: Mapping[str, str] = field(default_factory=dict)
    constants: Mapping[str, Any] = field(default_factory=dict)


def reshape_to_row(tensor: Tensor) -> Tensor:
    """(in,) as (1, in)."""
    return tensor[None]


def reshape_to_column(tensor: Tensor) -> Tensor:
    """(out,) as (out, 1)."""
    return tensor[:, None]


def keep_shape(tensor: Tensor) -> Tensor:
    """The tensor itself."""
    return tensor


PEFT_TUNERS = (
    PEFTTuner("IA3", IA3, {"scale_in": ("ia3_l", reshape_to_row), "scale_out": ("ia3_l", reshape_to_column)}, {}),
    PEFTTuner(
        "VERA",
        VeRA,
        {"vera_scale_d": ("vera_lambda_d", keep_shape), "vera_scale_b": ("vera_lambda_b", keep_shape)},
        {"r": "r", "dropout": "vera_dropout", "d_initial": "d_initial", "projection_seed": "projection_prng_key"},
        {"projections.a": "base_model.vera_A", "projections.b": "base_model.vera_B"},
        {"save_projection": True, "bias": "none"},
    ),
    PEFTTuner(
        "BOFT",
        BOFT,
        {"boft_r": ("boft_R", keep_shape), "boft_scale": ("boft_s", reshape_to_column)},
        {"block_size": "boft_block_size", "butterfly_factors": "boft_n_butterfly_factor"},
        constants={"boft_block_num": 0, "boft_dropout": 0.0, "bias": "none"},
    ),
)


def list_plain_layers(config: Config) -> dict[str, str]:
    """Our linear layers that are published as one layer, stored as (out, in), and its name."""
    return {
        strip_ending(mapping.names[0]): strip_ending(mapping.hf_name)
        for mapping in list_published_mappings(config).values()
        if len(mapping.names) == 1 and mapping.kind == "rename" and mapping.expert is None
        if not mapping.transposed and mapping.hf_name.endswith(".weight")
    }


def convert_tuner_to_peft(
    tensors: Mapping[str, Tensor], settings: Tuner, config: Config
) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """PEFT's tensors and config; None if it has no format for the tuner, or not for a layer that is part of another."""
    tuner = next((tuner for tuner in PEFT_TUNERS if tuner.settings_class is type(settings)), None)
    layers = list_plain_layers(config)
    if tuner is None or any(name.rpartition(".")[0] not in {*layers, "projections"} for name in tensors):
        return None
    published: dict[str, Tensor] = {}
    target_modules, feedforward_modules = set(), set()
    for name, tensor in tensors.items():
        owner, _, key = name.rpartition(".")
        if name in tuner.shared:
            published[tuner.shared[name]] = tensor
            continue
        peft_key, reshape = tuner.keys[key]
        published[f"{PREFIX}{layers[owner]}.{peft_key}"] = reshape(tensor)
        target_modules.add(layers[owner])
        if key == "scale_in":
            feedforward_modules.add(layers[owner])
    values = {
        "peft_type": tuner.peft_type,
        "task_type": "CAUSAL_LM",
        "target_modules": sorted(target_modules),
        "inference_mode": True,
        **({"feedforward_modules": sorted(feedforward_modules)} if tuner.settings_class is IA3 else {}),
        **{peft_key: getattr(settings, key) for key, peft_key in tuner.settings.items()},
        **tuner.constants,
    }
    return published, values


def convert_tuner_from_peft(
    published: Mapping[str, Tensor], values: Mapping[str, Any], config: Config
) -> tuple[Tuner, dict[str, Tensor]] | None:
    """Our settings and tensors of one of these tuners; None if the adapter is of another kind.

    Raises:
        UserError: naming a tensor that the model does not have.
    """
    tuner = next((tuner for tuner in PEFT_TUNERS if tuner.peft_type == values.get("peft_type")), None)
    if tuner is None:
        return None
    layers = {hf_name: name for name, hf_name in list_plain_layers(config).items()}
    shared = {peft_name: name for name, peft_name in tuner.shared.items()}
    tensors: dict[str, Tensor] = {}
    for name, tensor in published.items():
        layer, _, peft_key = name.removeprefix(PREFIX).rpartition(".")
        keys = [
            key for key, (known, reshape) in tuner.keys.items() if known == peft_key and has_shape_of(reshape, tensor)
        ]
        if name in shared:
            tensors[shared[name]] = tensor
        elif layer in layers and keys:
            is_reshaped = tuner.keys[keys[0]][1] is not keep_shape
            tensors[f"{layers[layer]}.{keys[0]}"] = tensor.flatten() if is_reshaped else tensor
        else:
            raise UserError(f"{name}: no tensor of this name in the model; load the adapter's own base")
    if missing := sorted(tuner.shared.keys() - tensors.keys()):
        raise UserError(f"{tuner.shared[missing[0]]} is missing; save the adapter with save_projection: true")
    owners = {key: sorted({name.rpartition(".")[0] for name in tensors if name.endswith(key)}) for key in tuner.keys}
    settings = {key: values[peft_key] for key, peft_key in tuner.settings.items()}
    settings["target_modules"] = sorted({name for names in owners.values() for name in names})
    if tuner.settings_class is IA3:
        settings["feedforward_modules"] = owners["scale_in"]
    return tuner.settings_class(**settings), tensors


def has_shape_of(reshape: Reshape, tensor: Tensor) -> bool:
    """Whether a tensor has the shape that a reshape gives."""
    return reshape is keep_shape or (tensor.dim() == 2 and tensor.shape[reshape is reshape_to_column] == 1)
