"""Translations of the `config.json` keys of layers and heads: windows, layers without rope, biases, scales, heads."""

from typing import Any

from litgpt.model import hf_config_values as hf
from litgpt.model.hf_config_values import Translation, Values, unsupported_key
from litgpt.model.transformer_config import TransformerConfig


def read_layer_types(
    values: Values,
    fields: Values,
    *,
    period: str | None = None,
    first: str | None = None,
    switch: str | None = None,
    leading: bool = False,
) -> dict[str, Any]:
    """Layers with sliding window attention: `layer_types`, or in files without it a rule; all layers without a rule.

    Args:
        period: the key of a period; one layer in each has full attention.
        leading: it is the first of them, not the last.
        first: the key of the first layer with a window.
        switch: the key that enables windows.
    """
    window = values.get("sliding_window") if switch is None or values.get(switch) else None
    if window is None:
        return {}
    if values.get("layer_types") is not None:
        windowed = hf.parse_layer_kinds("layer_types", values["layer_types"], fields, {hf.LOCAL: 1, hf.GLOBAL: 0})
    elif period is not None:
        every = hf.check_count(period, values.get(period))
        windowed = [int((layer + (not leading)) % every != 0) for layer in hf.layer_range(fields)]
    elif first is not None:
        start = values.get(first)
        windowed = [int(isinstance(start, int) and layer >= start) for layer in hf.layer_range(fields)]
    else:
        windowed = [1] * len(hf.layer_range(fields))
    if not any(windowed):
        return {}
    return {"sliding_window_size": window, **({} if all(windowed) else {"sliding_window_indices": windowed})}


def write_layer_types(
    config: TransformerConfig,
    *,
    period: str | None = None,
    first: str | None = None,
    switch: str | None = None,
    leading: bool = False,
) -> dict[str, Any]:
    """`layer_types`, and the keys of the rule as far as it can express the same."""
    local = [config.is_local(layer) for layer in range(config.n_layer)]
    written: dict[str, Any] = {"sliding_window": config.sliding_window_size}
    written["layer_types"] = [hf.LOCAL if mark else hf.GLOBAL for mark in local]
    if switch is not None:
        written[switch] = any(local)
    if first is not None:
        written[first] = local.index(True) if any(local) else config.n_layer
    if period is not None and not leading and not all(local):
        written[period] = local.index(False) + 1
    return written


def read_windowed_rope(values: Values, fields: Values, *, without_window: bool) -> dict[str, Any]:
    """Rotary embeddings only in layers with a window; with `without_window`, in all layers if there is no window."""
    windowed = hf.read_window_layers(fields)
    if all(windowed) or (without_window and values.get("sliding_window") is None):
        return {}
    return {"rope_layers": windowed}


def write_windowed_rope(_config: TransformerConfig, **_settings: bool) -> dict[str, Any]:
    """Nothing: `read_windowed_rope` uses the keys of the windows."""
    return {}


def read_rope_layers(values: Values, fields: Values, *, every: str) -> dict[str, Any]:
    """Layers with rotary embeddings: `no_rope_layers` (0 = without), or all but one in `every`."""
    given = values.get("no_rope_layers")
    if given:
        rotated = hf.parse_layer_kinds("no_rope_layers", given, fields, {0: 0, 1: 1})
    else:
        step = hf.check_count(every, values.get(every))
        rotated = [int((layer + 1) % step != 0) for layer in hf.layer_range(fields)]
    return {} if all(rotated) else {"rope_layers": rotated}


def write_rope_layers(config: TransformerConfig, **_settings: str) -> dict[str, Any]:
    """The keys of `read_rope_layers`."""
    return {"no_rope_layers": [int(config.rope_of(layer) is not None) for layer in range(config.n_layer)]}


def has_bias(config: TransformerConfig, which: str) -> bool:
    """Whether the linear layers of a bias field have biases: `attn_bias`, `attn_out_bias` or `mlp_bias`."""
    value = getattr(config, which)
    return bool(config.bias or value) if which == "attn_bias" else bool(config.bias if value is None else value)


def read_biases(values: Values, _fields: Values, **keys: str) -> dict[str, Any]:
    """The bias fields from their keys; one key may set several fields."""
    return {name: values.get(key) for name, key in keys.items()}


def write_biases(config: TransformerConfig, **keys: str) -> dict[str, Any]:
    """The keys of `read_biases`."""
    return {key: has_bias(config, name) for name, key in keys.items()}


def read_norm_places(values: Values, _fields: Values, *, after: str) -> dict[str, Any]:
    """Norms after attention and feed-forward instead of before, where the key says so."""
    is_after = bool(values.get(after))
    fields = {"norm_1": not is_after, "norm_2": not is_after}
    return {**fields, "post_attention_norm": is_after, "post_mlp_norm": is_after}


def write_norm_places(config: TransformerConfig, *, after: str) -> dict[str, Any]:
    """The key of `read_norm_places`."""
    return {after: config.post_attention_norm}


def read_inverse(values: Values, _fields: Values, **keys: str) -> dict[str, Any]:
    """Factors that the published model divides by and this one multiplies with."""
    return {name: 1 / hf.check_number(key, values.get(key)) for name, key in keys.items()}


def write_inverse(config: TransformerConfig, **keys: str) -> dict[str, Any]:
    """The keys of `read_inverse`."""
    return {key: 1 / getattr(config, name) for name, key in keys.items()}


def read_attention_scalar(values: Values, _fields: Values, *, key: str, multiplier: bool = False) -> dict[str, Any]:
    """The number whose inverse square root scales attention; with `multiplier`, the key holds the scale itself."""
    number = hf.check_number(key, values.get(key))
    return {"attention_scores_scalar": float(f"{number**-2:.12g}") if multiplier else number}


def write_attention_scalar(config: TransformerConfig, *, key: str, multiplier: bool = False) -> dict[str, Any]:
    """The key of `read_attention_scalar`."""
    scalar = config.attention_scores_scalar or config.head_size
    assert scalar is not None
    return {key: scalar**-0.5 if multiplier else scalar}


def read_multi_query(values: Values, fields: Values, *, key: str) -> dict[str, Any]:
    """Multi-query attention, or one key-value head for each head."""
    return {"n_query_groups": 1 if values.get(key) else fields.get("n_head")}


def write_multi_query(config: TransformerConfig, *, key: str) -> dict[str, Any]:
    """The key of `read_multi_query`."""
    return {key: config.n_query_groups == 1}


def read_decoder_architecture(values: Values, fields: Values) -> dict[str, Any]:
    """Falcon's two decoders: the new one has grouped heads and optionally two norms, the old one neither."""
    parallel = bool(values.get("parallel_attn"))
    if not values.get("new_decoder_architecture"):
        heads = 1 if values.get("multi_query") else fields.get("n_head")
        return {"n_query_groups": heads, "parallel_residual": parallel, "shared_attention_norm": parallel}
    if not parallel:
        raise unsupported_key("parallel_attn", False, "true with new_decoder_architecture: true")
    norms, heads = values.get("num_ln_in_parallel_attn"), values.get("num_kv_heads") or fields.get("n_head")
    return {"n_query_groups": heads, "parallel_residual": True, "shared_attention_norm": norms == 1}


def write_decoder_architecture(config: TransformerConfig) -> dict[str, Any]:
    """The keys of `read_decoder_architecture`."""
    plain_heads = config.n_query_groups in (1, config.n_head)
    old = plain_heads and config.shared_attention_norm == config.parallel_residual
    return {
        "new_decoder_architecture": not old,
        "multi_query": config.n_query_groups == 1,
        "num_kv_heads": config.n_query_groups,
        "parallel_attn": config.parallel_residual,
        "num_ln_in_parallel_attn": None if old else 2 - config.shared_attention_norm,
    }


LAYER_TRANSLATIONS = {
    "layer_types": Translation(read_layer_types, write_layer_types),
    "windowed_rope": Translation(read_windowed_rope, write_windowed_rope),
    "rope_layers": Translation(read_rope_layers, write_rope_layers),
    "biases": Translation(read_biases, write_biases),
    "norm_places": Translation(read_norm_places, write_norm_places),
    "inverse": Translation(read_inverse, write_inverse),
    "attention_scalar": Translation(read_attention_scalar, write_attention_scalar),
    "multi_query": Translation(read_multi_query, write_multi_query),
    "decoder_architecture": Translation(read_decoder_architecture, write_decoder_architecture),
}
