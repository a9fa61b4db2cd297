"""How a `config.json` tells of rotary embeddings: one for all layers, or one for each kind of layer."""

import math
from typing import Any

from litgpt.errors import UserError
from litgpt.model.hf_config_values import (
    GLOBAL,
    LOCAL,
    Translation,
    Values,
    head_size,
    real,
    unsupported,
    whole,
    window_marks,
)
from litgpt.model.transformer_config import ROPE_KINDS, TransformerConfig

# Settings of rotary scaling that a config.json calls otherwise than we do.
ROPE_SETTINGS = {"original_max_seq_len": "original_max_position_embeddings"}
# What a config.json says elsewhere already.
LEFT_UNSAID = {"dynamic": ("original_max_seq_len",), "longrope": ("factor",)}


def rope_mapping(values: Values) -> Values:
    """The settings of the rotary embedding as transformers takes them: `rope_scaling` before `rope_parameters`."""
    rope = values.get("rope_scaling") or values.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise UserError(f"config.json: rope_parameters: {rope!r} is no mapping like {{rope_type: default}}")
    return rope


def read_rope(
    values: Values,
    ours: Values,
    *,
    theta: str = "rope_theta",
    partial: str | None = None,
    original: str | None = None,
    temperature: str | None = None,
    stretch: str | None = None,
) -> dict[str, Any]:
    """One rotary embedding for all layers.

    Args:
        theta, partial, original: the keys, beside the mapping, of base, share of a head and length before scaling.
        temperature: the key, in the mapping, of the factor on the logarithm of a query's position.
        stretch: the key, in the mapping, of a growth of the base that holds for every length.
    """
    rope = rope_mapping(values)
    if any(isinstance(value, dict) for value in rope.values()):
        raise UserError(f"config.json: rope_parameters: {rope!r} is no mapping like {{rope_type: default}}")
    beside = {ROPE_SETTINGS["original_max_seq_len"]: values[original]} if original and values.get(original) else {}
    base = rope.get("rope_theta", values.get(theta))
    if stretch and rope.get(stretch):
        size = real("head_dim", ours.get("head_size"))
        base = real(theta, base) * real(stretch, rope[stretch]) ** (size / (size - 2))
        rope = {}
    settings = read_scaling({**rope, **beside}, ours)
    found = {"rope_base": base, "rope_adjustments": settings}
    if partial:
        found["rotary_percentage"] = rope.get("partial_rotary_factor", values.get(partial))
    if temperature and rope.get(temperature) is not None:
        length = (settings or {}).get("original_max_seq_len")
        found["query_temperature"] = {"first_position": 0, "floor_scale": length, "scale": rope[temperature]}
    return {key: value for key, value in found.items() if value is not None}


def write_rope(
    config: TransformerConfig,
    *,
    theta: str = "rope_theta",
    partial: str | None = None,
    original: str | None = None,
    temperature: str | None = None,
    stretch: str | None = None,
) -> dict[str, Any]:
    """The keys of `read_rope`, in the old form and in the new; a stretched base as it is."""
    scaling = write_scaling(config)
    share = {"partial_rotary_factor": config.rotary_percentage} if partial else {}
    if temperature:  # without a number there transformers fails
        scaling[temperature] = (config.query_temperature or {"scale": 0.0})["scale"]
    old, beside = scaling, {}
    if original:  # where it is beside, older transformers wants it nowhere else, and the kind as `type`
        old = {"type" if key == "rope_type" else key: value for key, value in scaling.items()}
        beside = {original: old.pop(ROPE_SETTINGS["original_max_seq_len"], config.block_size)}
    base = float(config.rope_base)
    return {
        theta: base,
        **({partial: config.rotary_percentage} if partial else {}),
        **beside,
        "rope_scaling": old if len(scaling) > 1 else None,
        "rope_parameters": {**scaling, **share, "rope_theta": base},
    }


def read_scaling(rope: Values, ours: Values) -> dict[str, Any] | None:
    """`rope_adjustments` out of the settings of one rotary embedding; None if it is not scaled."""
    kind = str(rope.get("rope_type", rope.get("type", "default")))
    if rope.get("short_factor") is not None:
        kind = "longrope"  # Phi-3 was published with the types su and yarn for it
    if kind == "default":
        return None
    if kind not in ROPE_KINDS:
        raise unsupported("rope_type", kind, f"default or {sorted(ROPE_KINDS)}")
    said = {**rope, "beta_fast": rope.get("beta_fast") or 32, "beta_slow": rope.get("beta_slow") or 1}
    length = rope.get(ROPE_SETTINGS["original_max_seq_len"])
    if length is None or kind == "dynamic":  # which scales from the full length on
        length = ours.get("block_size")
    said[ROPE_SETTINGS["original_max_seq_len"]] = length
    if kind == "longrope" and said.get("factor") is None:
        said["factor"] = real("max_position_embeddings", ours.get("block_size")) / real("original length", length)
    needed, more = ROPE_KINDS[kind]
    found = {key: said.get(ROPE_SETTINGS.get(key, key)) for key in sorted(needed | more)}
    return {key: value for key, value in found.items() if value is not None or key in needed}


def write_scaling(config: TransformerConfig) -> dict[str, Any]:
    """The settings of `read_scaling`."""
    adjustments = config.rope_adjustments or {}
    kind = config.rope_kind or "default"
    if config.rope_condense_ratio != 1:
        kind, adjustments = "linear", {"factor": config.rope_condense_ratio}
    if kind == "dynamic" or (kind == "longrope" and follows_length(config)):
        adjustments = {key: value for key, value in adjustments.items() if key not in LEFT_UNSAID[kind]}
    return {"rope_type": kind, **{ROPE_SETTINGS.get(key, key): value for key, value in adjustments.items()}}


def follows_length(config: TransformerConfig) -> bool:
    """Whether the factor of the scaling is just how much longer than at first a context may be."""
    rope = config.rope_adjustments or {}
    return rope.get("factor") == config.block_size / rope["original_max_seq_len"]


def read_rope_by_layer(values: Values, ours: Values, *, theta: str, local: str) -> dict[str, Any]:
    """A rotary embedding for layers that see all and, unscaled, one for those in `sliding_window_indices`.

    Args:
        theta, local: the keys of their bases in a file from before transformers 5.
    """
    rope = rope_mapping(values)
    whole_view, window = rope.get(GLOBAL, rope), rope.get(LOCAL, {})
    if not isinstance(whole_view, dict) or not isinstance(window, dict):
        raise UserError(f"config.json: rope_parameters: {rope!r} is no mapping like {{{GLOBAL}: {{rope_theta: 1e4}}}}")
    base = whole_view.get("rope_theta", values.get(theta))
    local_base = window.get("rope_theta", values.get(local))
    adjustments = read_scaling(whole_view, ours)
    found: dict[str, Any] = {"rope_base": base}
    if adjustments is not None:
        found["rope_adjustments"] = adjustments
    if read_scaling(window, ours) is not None:
        raise unsupported(f"rope_parameters.{LOCAL}", window, "rope_type: default")
    if local_base != base or adjustments is not None:
        found |= {"rope_local_base_freq": local_base, "rope_indices": window_marks(ours)}
    return found


def write_rope_by_layer(config: TransformerConfig, *, theta: str, local: str) -> dict[str, Any]:
    """The keys of `read_rope_by_layer`, in the old form and in the new."""
    base = float(config.rope_base)
    local_base = base if config.rope_local_base_freq is None else float(config.rope_local_base_freq)
    scaling = write_scaling(config)
    return {
        **({local: local_base} if local != theta else {}),
        theta: base,
        "rope_scaling": scaling if len(scaling) > 1 else None,
        "rope_parameters": {
            GLOBAL: {**scaling, "rope_theta": base},
            LOCAL: {"rope_type": "default", "rope_theta": local_base},
        },
    }


def read_rotary_dim(values: Values, ours: Values, *, key: str) -> dict[str, Any]:
    """How many numbers of a head are rotated, of which we keep the share."""
    size = head_size(ours)
    rotated = whole(key, values.get(key))
    share = rotated / size
    return {"rotary_percentage": share if int(share * size) == rotated else math.nextafter(share, 2)}


def write_rotary_dim(config: TransformerConfig, *, key: str) -> dict[str, Any]:
    """The key of `read_rotary_dim`."""
    return {key: config.rotary_size}


ROPE_TRANSLATIONS = {
    "rope": Translation(read_rope, write_rope),
    "rope_by_layer": Translation(read_rope_by_layer, write_rope_by_layer),
    "rotary_dim": Translation(read_rotary_dim, write_rotary_dim),
}
