"""How a `config.json` tells of layers and heads: windows, layers without positions, biases, scales, shared heads."""

from typing import Any

from litgpt.model.hf_config_values import (
    GLOBAL,
    LOCAL,
    Translation,
    Values,
    layers_in,
    marks,
    real,
    unsupported,
    whole,
    window_marks,
)
from litgpt.model.transformer_config import TransformerConfig


def read_layer_types(
    values: Values,
    ours: Values,
    *,
    period: str | None = None,
    first: str | None = None,
    switch: str | None = None,
    leading: bool = False,
) -> dict[str, Any]:
    """Which layers see a window only: `layer_types`, or in files without it a rule; all of them if no rule is named.

    Args:
        period: the key of a number: one layer in so many sees all.
        leading: it is the first of them, not the last.
        first: the key of the first layer with a window.
        switch: the key that must be true for any window.
    """
    window = values.get("sliding_window") if switch is None or values.get(switch) else None
    if window is None:
        return {}
    if values.get("layer_types") is not None:
        found = marks("layer_types", values["layer_types"], ours, {LOCAL: 1, GLOBAL: 0})
    elif period is not None:
        every = whole(period, values.get(period))
        found = [int((layer + (not leading)) % every != 0) for layer in layers_in(ours)]
    elif first is not None:
        start = values.get(first)
        found = [int(isinstance(start, int) and layer >= start) for layer in layers_in(ours)]
    else:
        found = [1] * len(layers_in(ours))
    if not any(found):
        return {}
    return {"sliding_window_size": window, **({} if all(found) else {"sliding_window_indices": found})}


def write_layer_types(
    config: TransformerConfig,
    *,
    period: str | None = None,
    first: str | None = None,
    switch: str | None = None,
    leading: bool = False,
) -> dict[str, Any]:
    """`layer_types`, and the rule that files without it follow as far as it can say the same."""
    local = [config.is_local(layer) for layer in range(config.n_layer)]
    written: dict[str, Any] = {"sliding_window": config.sliding_window_size}
    written["layer_types"] = [LOCAL if mark else GLOBAL for mark in local]
    if switch is not None:
        written[switch] = any(local)
    if first is not None:
        written[first] = local.index(True) if any(local) else config.n_layer
    if period is not None and not leading and not all(local):
        written[period] = local.index(False) + 1
    return written


def read_windowed_rope(values: Values, ours: Values, *, without_window: bool) -> dict[str, Any]:
    """Only layers that see a window rotate by position; `without_window`, whether all do where the model has none."""
    windowed = window_marks(ours)
    if all(windowed) or (without_window and values.get("sliding_window") is None):
        return {}
    return {"rope_layers": windowed}


def write_windowed_rope(config: TransformerConfig, *, without_window: bool) -> dict[str, Any]:
    """Nothing: `read_windowed_rope` goes by the keys of the windows."""
    return {}


def read_rope_layers(values: Values, ours: Values, *, every: str) -> dict[str, Any]:
    """Which layers rotate by position: `no_rope_layers` (0 = not), or all but one in `every`."""
    given = values.get("no_rope_layers")
    if given:
        found = marks("no_rope_layers", given, ours, {0: 0, 1: 1})
    else:
        step = whole(every, values.get(every))
        found = [int((layer + 1) % step != 0) for layer in layers_in(ours)]
    return {} if all(found) else {"rope_layers": found}


def write_rope_layers(config: TransformerConfig, *, every: str) -> dict[str, Any]:
    """The keys of `read_rope_layers`."""
    return {"no_rope_layers": [int(config.rope_of(layer) is not None) for layer in range(config.n_layer)]}


def has_bias(config: TransformerConfig, which: str) -> bool:
    """Whether the layers of a bias field have one: `attn_bias`, `attn_out_bias` or `mlp_bias`."""
    said = getattr(config, which)
    return bool(config.bias or said) if which == "attn_bias" else bool(config.bias if said is None else said)


def read_biases(values: Values, ours: Values, **keys: str) -> dict[str, Any]:
    """Our bias fields out of the keys that decide them; one key may decide several."""
    return {ours: values.get(key) for ours, key in keys.items()}


def write_biases(config: TransformerConfig, **keys: str) -> dict[str, Any]:
    """The keys of `read_biases`."""
    return {key: has_bias(config, ours) for ours, key in keys.items()}


def read_inverse(values: Values, ours: Values, **keys: str) -> dict[str, Any]:
    """A factor that they divide by and we multiply with."""
    return {ours: 1 / real(key, values.get(key)) for ours, key in keys.items()}


def write_inverse(config: TransformerConfig, **keys: str) -> dict[str, Any]:
    """The keys of `read_inverse`."""
    return {key: 1 / getattr(config, ours) for ours, key in keys.items()}


def read_attention_scalar(values: Values, ours: Values, *, key: str, multiplier: bool = False) -> dict[str, Any]:
    """The number whose inverse square root multiplies attention's scores; with `multiplier`, they say that root."""
    said = real(key, values.get(key))
    return {"attention_scores_scalar": float(f"{said**-2:.12g}") if multiplier else said}


def write_attention_scalar(config: TransformerConfig, *, key: str, multiplier: bool = False) -> dict[str, Any]:
    """The key of `read_attention_scalar`."""
    scalar = config.attention_scores_scalar or config.head_size
    assert scalar is not None
    return {key: scalar**-0.5 if multiplier else scalar}


def read_multi_query(values: Values, ours: Values, *, key: str) -> dict[str, Any]:
    """Whether all heads share one key-value head, or have one each."""
    return {"n_query_groups": 1 if values.get(key) else ours.get("n_head")}


def write_multi_query(config: TransformerConfig, *, key: str) -> dict[str, Any]:
    """The key of `read_multi_query`."""
    return {key: config.n_query_groups == 1}


def read_decoder_architecture(values: Values, ours: Values) -> dict[str, Any]:
    """Falcon's two decoders: the new one shares key-value heads and may norm twice, the old one does neither."""
    parallel = bool(values.get("parallel_attn"))
    if not values.get("new_decoder_architecture"):
        heads = 1 if values.get("multi_query") else ours.get("n_head")
        return {"n_query_groups": heads, "parallel_residual": parallel, "shared_attention_norm": parallel}
    if not parallel:
        raise unsupported("parallel_attn", False, "true beside new_decoder_architecture: true")
    norms, heads = values.get("num_ln_in_parallel_attn"), values.get("num_kv_heads") or ours.get("n_head")
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
    "inverse": Translation(read_inverse, write_inverse),
    "attention_scalar": Translation(read_attention_scalar, write_attention_scalar),
    "multi_query": Translation(read_multi_query, write_multi_query),
    "decoder_architecture": Translation(read_decoder_architecture, write_decoder_architecture),
}
