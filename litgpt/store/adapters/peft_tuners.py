"""Convert tuners other than LoRA to and from PEFT's format: names and shapes of tensors, and keys of the config."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from litgpt.errors import UserError
from litgpt.model.config import Config
from litgpt.recipe.tuner import BOFT, IA3, AdaLoRA, Bone, FourierFT, Tuner, VeRA
from litgpt.store.adapters.lora_pairs import strip_ending
from litgpt.store.adapters.peft_lora import PREFIX, list_published_mappings
from litgpt.store.adapters.peft_options import MERGE, TASK_TYPES


@dataclass(frozen=True)
class PEFTTuner:
    """PEFT's format of a tuner.

    Attributes:
        keys: our name of a parameter of a layer to PEFT's, and the dimension of size 1 that PEFT adds, if any.
        settings: our name of a setting to PEFT's.
        choices: our name of a setting to PEFT's value of each of our values.
        shared: our name of a parameter that all layers share to PEFT's.
        constants: other keys of PEFT's config.
        computed: further keys of PEFT's config, and their values as a function of our settings.
    """

    peft_type: str
    settings_class: type[Tuner]
    keys: Mapping[str, tuple[str, int | None]]
    settings: Mapping[str, str]
    shared: Mapping[str, str] = field(default_factory=dict)
    constants: Mapping[str, Any] = field(default_factory=dict)
    choices: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    computed: Mapping[str, Callable[[Any], Any]] = field(default_factory=dict)


def count_schedule_steps(settings: AdaLoRA) -> int:
    """A number of steps, without which PEFT loads no adapter: that of the settings, or the fewest that they allow."""
    return settings.total_steps or settings.tinit + settings.tfinal + 1


BONE_SETTINGS = {"r": "r", "variant": "init_weights"}
BONE_VARIANTS = {"variant": {"bone": True, "bat": "bat", "mini": "mini"}}
PEFT_TUNERS = (
    PEFTTuner(
        "ADALORA",
        AdaLoRA,
        {"lora_a": ("lora_A", None), "lora_e": ("lora_E", 1), "lora_b": ("lora_B", None)},
        {
            **{key: key for key in ("target_r", "init_r", "tinit", "tfinal", "beta1", "beta2", "orth_reg_weight")},
            **{"alpha": "lora_alpha", "dropout": "lora_dropout", "delta_t": "deltaT"},
        },
        constants={"bias": "none", "rank_pattern": None},
        computed={"total_step": count_schedule_steps},
    ),
    PEFTTuner("IA3", IA3, {"scale_in": ("ia3_l", 0), "scale_out": ("ia3_l", 1)}, {}),
    PEFTTuner(
        "VERA",
        VeRA,
        {"vera_scale_d": ("vera_lambda_d", None), "vera_scale_b": ("vera_lambda_b", None)},
        {"r": "r", "dropout": "vera_dropout", "d_initial": "d_initial", "projection_seed": "projection_prng_key"},
        {"projections.a": "base_model.vera_A", "projections.b": "base_model.vera_B"},
        {"save_projection": True, "bias": "none"},
    ),
    PEFTTuner(
        "BOFT",
        BOFT,
        {"boft_r": ("boft_R", None), "boft_scale": ("boft_s", 1)},
        {"block_size": "boft_block_size", "butterfly_factors": "boft_n_butterfly_factor"},
        constants={"boft_block_num": 0, "boft_dropout": 0.0, "bias": "none"},
    ),
    PEFTTuner(
        "FOURIERFT",
        FourierFT,
        {"fourier_spectrum": ("fourierft_spectrum", None)},
        {
            "n_frequency": "n_frequency",
            "scaling": "scaling",
            "frequency_seed": "random_loc_seed",
            "init": "init_weights",
        },
        constants={"bias": "none"},
        choices={"init": {"normal": False, "zero": True}},
    ),
    PEFTTuner(
        "MISS",
        Bone,
        {"bone_block": ("miss_block", None)},
        {**BONE_SETTINGS, "mini_r": "mini_r", "dropout": "miss_dropout"},
        constants={"bias": "none"},
        choices=BONE_VARIANTS,
    ),
    PEFTTuner("BONE", Bone, {"bone_block": ("bone_block", None)}, BONE_SETTINGS, choices=BONE_VARIANTS),
)
"""PEFT's format of each tuner; the first one of a tuner is written, and others are those of older versions of PEFT."""


def list_plain_layers(config: Config) -> dict[str, str]:
    """Our linear layers that are published as one layer each, stored as (out, in), and the published names."""
    return {
        strip_ending(mapping.names[0]): strip_ending(mapping.hf_name)
        for mapping in list_published_mappings(config).values()
        if len(mapping.names) == 1 and mapping.kind == "rename" and mapping.expert is None
        if not mapping.transposed and mapping.hf_name.endswith(".weight")
    }


def convert_tuner_to_peft(
    tensors: Mapping[str, Tensor], settings: Tuner, config: Config
) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """PEFT's tensors and config; None if PEFT has no format for the tuner, or for layers that are published fused."""
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
        peft_key, dim = tuner.keys[key]
        published[f"{PREFIX}{layers[owner]}.{peft_key}"] = tensor if dim is None else tensor.unsqueeze(dim)
        target_modules.add(layers[owner])
        if key == "scale_in":
            feedforward_modules.add(layers[owner])
    values = {
        "peft_type": tuner.peft_type,
        "task_type": TASK_TYPES[config.output],
        "target_modules": sorted(target_modules),
        "inference_mode": True,
        **({"feedforward_modules": sorted(feedforward_modules)} if tuner.settings_class is IA3 else {}),
        **{peft_key: compute(settings) for peft_key, compute in tuner.computed.items()},
        **{peft_key: convert_setting(tuner, key, settings) for key, peft_key in tuner.settings.items()},
        **tuner.constants,
    }
    return published, values


def convert_setting(tuner: PEFTTuner, key: str, settings: Tuner) -> Any:
    """PEFT's value of one of our settings."""
    value = getattr(settings, key)
    return tuner.choices[key][value] if key in tuner.choices else value


def read_setting(tuner: PEFTTuner, key: str, values: Mapping[str, Any]) -> Any:
    """Our value of one of PEFT's settings.

    Raises:
        UserError: if we have no such value.
    """
    peft_key = tuner.settings[key]
    if key not in tuner.choices:
        return values[peft_key]
    known = {str(peft_value): value for value, peft_value in tuner.choices[key].items()}
    if str(values[peft_key]) not in known:
        raise UserError(f"{peft_key}: {values[peft_key]} is not one of {', '.join(known)}; {MERGE}")
    return known[str(values[peft_key])]


def convert_tuner_from_peft(
    published: Mapping[str, Tensor], values: Mapping[str, Any], config: Config
) -> tuple[Tuner, dict[str, Tensor]] | None:
    """Our settings and tensors of an adapter in PEFT's format; None if it is of another kind.

    Raises:
        UserError: naming a tensor that the model does not have.
    """
    tuner = next((tuner for tuner in PEFT_TUNERS if tuner.peft_type == values.get("peft_type")), None)
    if tuner is None:
        return None
    published = restore_pruned_ranks(published, values.get("rank_pattern") or {})
    layers = {hf_name: name for name, hf_name in list_plain_layers(config).items()}
    others = {strip_ending(hf_name) for hf_name in list_published_mappings(config)} - layers.keys()
    shared = {peft_name: name for name, peft_name in tuner.shared.items()}
    tensors: dict[str, Tensor] = {}
    for name, tensor in published.items():
        layer, _, peft_key = name.removeprefix(PREFIX).rpartition(".")
        keys = [
            key
            for key, (known, dim) in tuner.keys.items()
            if known == peft_key and (dim is None or (tensor.dim() == 2 and tensor.shape[dim] == 1))
        ]
        if name in shared:
            tensors[shared[name]] = tensor
        elif layer in layers and keys:
            _, dim = tuner.keys[keys[0]]
            tensors[f"{layers[layer]}.{keys[0]}"] = tensor if dim is None else tensor.squeeze(dim)
        elif layer in others:
            raise UserError(f"target_modules: {tuner.peft_type} on {layer} is not supported; {MERGE}")
        else:
            raise UserError(f"{name}: no tensor of this name in the model; load the adapter's own base")
    if missing := sorted(tuner.shared.keys() - tensors.keys()):
        raise UserError(f"{tuner.shared[missing[0]]} is missing; save the adapter with save_projection: true")
    owners = {key: sorted({name.rpartition(".")[0] for name in tensors if name.endswith(key)}) for key in tuner.keys}
    settings = {key: read_setting(tuner, key, values) for key in tuner.settings}
    settings["target_modules"] = sorted({name for names in owners.values() for name in names})
    if tuner.settings_class is IA3:
        settings["feedforward_modules"] = owners["scale_in"]
    if tuner.settings_class is BOFT:
        settings["block_size"] = find_boft_block_size(tensors)
    return tuner.settings_class(**settings), tensors


def restore_pruned_ranks(published: Mapping[str, Tensor], pattern: Mapping[str, list[bool]]) -> dict[str, Tensor]:
    """The tensors of AdaLoRA with zeros for the singular values and vectors that PEFT leaves out of the file.

    Args:
        pattern: whether each singular value is in the file, by its published name.

    Raises:
        UserError: if a tensor has another rank.
    """
    restored = dict(published)
    for name, kept in pattern.items():
        indices = torch.tensor(kept).nonzero().flatten()
        for key, dim in (("lora_A", 0), ("lora_E", 0), ("lora_B", 1)):
            full_name = name.removesuffix("lora_E") + key
            tensor = published[full_name]
            if tensor.shape[dim] != len(indices):
                raise UserError(f"rank_pattern: {full_name} has {tensor.shape[dim]} ranks, not {len(indices)}; {MERGE}")
            shape = [len(kept) if number == dim else size for number, size in enumerate(tensor.shape)]
            restored[full_name] = tensor.new_zeros(shape).index_copy_(dim, indices, tensor)
    return restored


def find_boft_block_size(tensors: Mapping[str, Tensor]) -> int:
    """The size of BOFT's blocks.

    Raises:
        UserError: if the blocks of layers differ in size.
    """
    sizes = sorted({tensor.shape[-1] for name, tensor in tensors.items() if name.endswith("boft_r")})
    if len(sizes) != 1:
        raise UserError(f"boft_block_num: blocks of sizes {', '.join(map(str, sizes))} are not supported; {MERGE}")
    return sizes[0]
