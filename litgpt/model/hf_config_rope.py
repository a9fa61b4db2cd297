"""Translations of the `config.json` keys of rotary embeddings: one for all layers, or one for each kind of layer."""

import math
from typing import Any

from litgpt.errors import UserError
from litgpt.model import hf_config_values as hf
from litgpt.model.hf_config_values import Translation, Values, unsupported_key
from litgpt.model.transformer_config import ROPE_KINDS, TransformerConfig

# Settings of rope scaling with other names in a config.json.
ROPE_SETTINGS = {"original_max_seq_len": "original_max_position_embeddings"}
# Settings that are other keys of a config.json.
OMITTED = {"dynamic": ("original_max_seq_len",), "longrope": ("factor",)}


def rope_mapping(values: Values) -> Values:
    """The settings of the rotary embedding as transformers reads them: `rope_scaling` before `rope_parameters`."""
    rope = values.get("rope_scaling") or values.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise UserError(f"config.json: rope_parameters: {rope!r} is not a mapping such as {{rope_type: default}}")
    return rope


def read_rope(
    values: Values,
    fields: Values,
    *,
    theta: str = "rope_theta",
    partial: str | None = None,
    original: str | None = None,
    temperature: str | None = None,
    stretch: str | None = None,
    sections: str | None = None,
    in_turn: str | None = None,
) -> dict[str, Any]:
    """One rotary embedding for all layers.

    Args:
        theta, partial, original: keys, outside the mapping, of base, partial rotary factor and original length.
        temperature: key, in the mapping, of the factor on the logarithm of a query's position.
        sections: key, in the mapping, of the numbers of pairs for time, rows and columns.
        in_turn: key, in the mapping, that is true, and tells that pairs of time, rows and columns are in turn.
        stretch: key, in the mapping, of an NTK factor on the base that applies to every length.
    """
    rope = rope_mapping(values)
    if any(isinstance(value, dict) for value in rope.values()):
        raise UserError(f"config.json: rope_parameters: {rope!r} is not a mapping such as {{rope_type: default}}")
    outside = {ROPE_SETTINGS["original_max_seq_len"]: values[original]} if original and values.get(original) else {}
    base = rope.get("rope_theta", values.get(theta))
    if stretch and rope.get(stretch):
        size = hf.check_number("head_dim", fields.get("head_size"))
        base = hf.check_number(theta, base) * hf.check_number(stretch, rope[stretch]) ** (size / (size - 2))
        rope = {}
    settings = read_scaling({**rope, **outside}, fields)
    read = {"rope_base": base, "rope_adjustments": settings}
    if partial:
        read["rotary_percentage"] = rope.get("partial_rotary_factor", values.get(partial))
    if temperature and rope.get(temperature) is not None:
        length = (settings or {}).get("original_max_seq_len")
        read["query_temperature"] = {"first_position": 0, "floor_scale": length, "scale": rope[temperature]}
    if sections:
        read["rope_sections"] = rope.get(sections)
    if in_turn and rope.get(in_turn, True) is not True:
        raise unsupported_key(f"rope_parameters.{in_turn}", rope[in_turn], "true")
    return {key: value for key, value in read.items() if value is not None}


def write_rope(
    config: TransformerConfig,
    *,
    theta: str = "rope_theta",
    partial: str | None = None,
    original: str | None = None,
    temperature: str | None = None,
    sections: str | None = None,
    in_turn: str | None = None,
    **_: Any,
) -> dict[str, Any]:
    """The keys of `read_rope`, in the form before transformers 5 and in that since; a stretched base as it is."""
    scaling = write_scaling(config)
    partial_factor = {"partial_rotary_factor": config.rotary_percentage} if partial else {}
    if temperature:  # transformers fails without a number
        scaling[temperature] = (config.query_temperature or {"scale": 0.0})["scale"]
    if sections:
        scaling[sections] = config.rope_sections
    if in_turn:
        scaling[in_turn] = True
    old, outside = scaling, {}
    if original:  # older transformers then expects it nowhere else, and the kind as `type`
        old = {"type" if key == "rope_type" else key: value for key, value in scaling.items()}
        outside = {original: old.pop(ROPE_SETTINGS["original_max_seq_len"], config.block_size)}
    base = float(config.rope_base)
    return {
        theta: base,
        **({partial: config.rotary_percentage} if partial else {}),
        **outside,
        "rope_scaling": old if len(scaling) > 1 else None,
        "rope_parameters": {**scaling, **partial_factor, "rope_theta": base},
    }


def read_scaling(rope: Values, fields: Values) -> dict[str, Any] | None:
    """`rope_adjustments` from the settings of one rotary embedding; None without scaling."""
    kind = str(rope.get("rope_type", rope.get("type", "default")))
    if rope.get("short_factor") is not None:
        kind = "longrope"  # Phi-3 was published with the types su and yarn
    if kind in ("default", "mrope"):  # the second, of Qwen2-VL, only names sections
        return None
    if kind not in ROPE_KINDS:
        raise unsupported_key("rope_type", kind, f"default or {sorted(ROPE_KINDS)}")
    merged = {**rope, "beta_fast": rope.get("beta_fast") or 32, "beta_slow": rope.get("beta_slow") or 1}
    length = rope.get(ROPE_SETTINGS["original_max_seq_len"])
    if length is None or kind == "dynamic":  # dynamic scaling starts at the full length
        length = fields.get("block_size")
    merged[ROPE_SETTINGS["original_max_seq_len"]] = length
    if kind == "longrope" and merged.get("factor") is None:
        new_length = hf.check_number("max_position_embeddings", fields.get("block_size"))
        merged["factor"] = new_length / hf.check_number("original length", length)
    required, optional = ROPE_KINDS[kind]
    settings = {key: merged.get(ROPE_SETTINGS.get(key, key)) for key in sorted(required | optional)}
    return {key: value for key, value in settings.items() if value is not None or key in required}


def write_scaling(config: TransformerConfig) -> dict[str, Any]:
    """The settings of `read_scaling`."""
    adjustments = config.rope_adjustments or {}
    kind = config.rope_kind or "default"
    if config.rope_condense_ratio != 1:
        kind, adjustments = "linear", {"factor": config.rope_condense_ratio}
    if kind == "dynamic" or (kind == "longrope" and is_factor_derived(config)):
        adjustments = {key: value for key, value in adjustments.items() if key not in OMITTED[kind]}
    return {"rope_type": kind, **{ROPE_SETTINGS.get(key, key): value for key, value in adjustments.items()}}


def is_factor_derived(config: TransformerConfig) -> bool:
    """Whether the scaling factor is the ratio of the new to the original context length."""
    rope = config.rope_adjustments or {}
    return rope.get("factor") == config.block_size / rope["original_max_seq_len"]


def read_rope_by_layer(values: Values, fields: Values, *, theta: str, local: str) -> dict[str, Any]:
    """A rotary embedding for layers with full attention and, unscaled, one for those in `sliding_window_indices`.

    Args:
        theta, local: keys of their bases in files from before transformers 5.
    """
    rope = rope_mapping(values)
    full, window = rope.get(hf.GLOBAL, rope), rope.get(hf.LOCAL, {})
    if not isinstance(full, dict) or not isinstance(window, dict):
        raise UserError(f"config.json: rope_parameters: {rope!r} is not a mapping such as {{{hf.GLOBAL}: {{...}}}}")
    base = full.get("rope_theta", values.get(theta))
    local_base = window.get("rope_theta", values.get(local))
    adjustments = read_scaling(full, fields)
    read: dict[str, Any] = {"rope_base": base}
    if adjustments is not None:
        read["rope_adjustments"] = adjustments
    if read_scaling(window, fields) is not None:
        raise unsupported_key(f"rope_parameters.{hf.LOCAL}", window, "rope_type: default")
    if local_base != base or adjustments is not None:
        read |= {"rope_local_base_freq": local_base, "rope_indices": hf.read_window_layers(fields)}
    return read


def write_rope_by_layer(config: TransformerConfig, *, theta: str, local: str) -> dict[str, Any]:
    """The keys of `read_rope_by_layer`, in the form before transformers 5 and in that since."""
    base = float(config.rope_base)
    local_base = base if config.rope_local_base_freq is None else float(config.rope_local_base_freq)
    scaling = write_scaling(config)
    return {
        **({local: local_base} if local != theta else {}),
        theta: base,
        "rope_scaling": scaling if len(scaling) > 1 else None,
        "rope_parameters": {
            hf.GLOBAL: {**scaling, "rope_theta": base},
            hf.LOCAL: {"rope_type": "default", "rope_theta": local_base},
        },
    }


def read_rotary_dim(values: Values, fields: Values, *, key: str) -> dict[str, Any]:
    """The number of rotated features of a head, as a fraction of the head size."""
    size = hf.compute_head_size(fields)
    rotated = hf.check_count(key, values.get(key))
    percentage = rotated / size
    return {"rotary_percentage": percentage if int(percentage * size) == rotated else math.nextafter(percentage, 2)}


def write_rotary_dim(config: TransformerConfig, *, key: str) -> dict[str, Any]:
    """The key of `read_rotary_dim`."""
    return {key: config.rotary_size}


ROPE_TRANSLATIONS = {
    "rope": Translation(read_rope, write_rope),
    "rope_by_layer": Translation(read_rope_by_layer, write_rope_by_layer),
    "rotary_dim": Translation(read_rotary_dim, write_rotary_dim),
}
