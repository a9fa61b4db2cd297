"""Convert the settings of LoRA to and from PEFT's `adapter_config.json`."""

import math
import re
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any, cast

from torch import Tensor

from litgpt.model.names import TensorMapping, is_stacked
from litgpt.recipe.tuner import Bias, LoRA
from litgpt.store.adapters.lora_pairs import COPY_SUFFIX, LoRAPart, strip_ending
from litgpt.store.adapters.peft_experts import is_router


def build_lora_config(
    layers: Mapping[str, tuple[TensorMapping, list[LoRAPart]]],
    copies: Collection[str],
    parameters: Collection[str],
    settings: LoRA,
    base: str,
    task_type: str,
) -> dict[str, Any]:
    """The content of `adapter_config.json`: PEFT's keys, with the ranks and scales of layers that differ.

    Args:
        layers: the mapping of each published layer that has a pair, and the parts of the pair.
        copies: the names of published tensors that are trained copies.
        parameters: the published tensors that PEFT adapts as parameters, not as layers.
        task_type: PEFT's name of what the model is for.
    """
    adapted = {layer: mapping.hf_name for layer, (mapping, _) in layers.items() if mapping.hf_name in parameters}
    ranks = {adapted.get(layer, layer): sum(part.rank for part in parts) for layer, (_, parts) in layers.items()}
    rank = Counter(ranks.values()).most_common(1)[0][0] if ranks else settings.r
    rank_pattern = {layer: other for layer, other in ranks.items() if other != rank}
    mappings = {layer: mapping for layer, (mapping, _) in layers.items()}
    has_experts = any(is_stacked(mapping.names[0]) or is_router(mapping) for mapping in mappings.values())
    rslora = settings.rslora and not has_experts  # fusing pairs of experts, PEFT would scale them as without
    saved = {strip_ending(name) for name in copies if settings.bias == "none" or not name.endswith("bias")}
    return {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": get_alpha(rank, settings, rslora=rslora),
        "lora_dropout": 0.0 if has_experts else settings.dropout,  # PEFT has none on parameters
        "target_modules": sorted(layers.keys() - adapted.keys()),
        "target_parameters": sorted(adapted.values()) or None,
        "modules_to_save": sorted(saved) or None,
        "bias": settings.bias,
        "use_rslora": rslora,
        "use_dora": settings.dora,
        "rank_pattern": rank_pattern,
        "alpha_pattern": {layer: get_alpha(other, settings, rslora=rslora) for layer, other in rank_pattern.items()},
        "fan_in_fan_out": any(mapping.transposed for layer, mapping in mappings.items() if layer not in adapted),
        "init_lora_weights": True,
        "inference_mode": True,
    }


def get_alpha(rank: int, settings: LoRA, *, rslora: bool) -> float:
    """The alpha that gives a pair of this rank the scale of the settings."""
    return settings.scale * (math.sqrt(rank) if rslora else rank)


def read_scale(layer: str, values: Mapping[str, Any]) -> float:
    """The scale of the update B A of a layer in PEFT's config."""
    names = (layer, f"{layer}.weight")  # a router's pattern may be that of its parameter

    def read(pattern_key: str, default_key: str) -> float:
        patterns = (values.get(pattern_key) or {}).items()
        matching = (value for key, value in patterns if any(re.fullmatch(rf"(.*\.)?({key})", name) for name in names))
        return float(next(matching, values[default_key]))

    rank = read("rank_pattern", "r")
    return read("alpha_pattern", "lora_alpha") / (math.sqrt(rank) if values.get("use_rslora") else rank)


def read_lora_settings(values: Mapping[str, Any], tensors: Mapping[str, Tensor], rank: int, scale: float) -> LoRA:
    """Convert PEFT's settings to ours, for pairs that all have this rank and scale."""
    rslora, bias = bool(values.get("use_rslora")), cast("Bias", values.get("bias") or "none")
    copies = [name.removesuffix(COPY_SUFFIX) for name in tensors if name.endswith(COPY_SUFFIX)]
    return LoRA(
        r=rank,
        alpha=scale * (math.sqrt(rank) if rslora else rank),
        dropout=float(values.get("lora_dropout") or 0.0),
        target_modules=list_owners(tensors, "lora_a"),
        modules_to_save=sorted(
            {name.rpartition(".")[0] for name in copies if bias == "none" or not name.endswith("bias")}
        ),
        bias=bias,
        rslora=rslora,
        dora=bool(values.get("use_dora")),
    )


def list_owners(tensors: Mapping[str, Tensor], key: str) -> list[str]:
    """The layers, or stacks of experts, that have a parameter of this kind."""
    return sorted({re.sub(rf"[._]{key}$", "", name) for name in tensors if name.endswith(key)})
