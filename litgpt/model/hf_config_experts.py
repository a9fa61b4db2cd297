"""Translations of the `config.json` keys of experts and latent attention."""

from typing import Any

from litgpt.model import hf_config_values as hf
from litgpt.model.hf_config_values import Translation, Values, unsupported_key
from litgpt.model.transformer_config import LATENT_SIZES, TransformerConfig

CHUNKED = "chunked_attention"


def list_expert_layers(config: TransformerConfig) -> list[int]:
    """1 for each layer with experts."""
    return [int(config.has_experts(layer)) for layer in range(config.n_layer)]


def to_moe_layers(with_experts: list[int]) -> dict[str, Any]:
    """`moe_layers`, unless every layer has experts."""
    return {} if all(with_experts) else {"moe_layers": with_experts}


def read_either(values: Values, _fields: Values, **keys: list[str]) -> dict[str, Any]:
    """Fields with several possible keys; the first that is present is read."""
    return {
        name: next((values[key] for key in names if values.get(key) is not None), None) for name, names in keys.items()
    }


def write_either(config: TransformerConfig, **keys: list[str]) -> dict[str, Any]:
    """The first key of each field."""
    return {names[0]: getattr(config, name) for name, names in keys.items()}


def read_sparse_step(values: Values, fields: Values) -> dict[str, Any]:
    """Experts in every `decoder_sparse_step`-th layer, except `mlp_only_layers`."""
    step = hf.check_count("decoder_sparse_step", values.get("decoder_sparse_step"))
    dense = values.get("mlp_only_layers") or []
    if not isinstance(dense, list):
        raise unsupported_key("mlp_only_layers", dense, "a list of layers such as [0]")
    return to_moe_layers([int((layer + 1) % step == 0 and layer not in dense) for layer in hf.layer_range(fields)])


def write_sparse_step(config: TransformerConfig) -> dict[str, Any]:
    """The keys of `read_sparse_step`."""
    dense = [layer for layer, mark in enumerate(list_expert_layers(config)) if not mark]
    return {"decoder_sparse_step": 1, "mlp_only_layers": dense}


def read_expert_layers(values: Values, fields: Values) -> dict[str, Any]:
    """Experts in the layers of `moe_layers`, else in every `interleave_moe_layer_step`-th layer."""
    listed = values.get("moe_layers")
    if listed is None:
        step = hf.check_count("interleave_moe_layer_step", values.get("interleave_moe_layer_step"))
        return to_moe_layers([int((layer + 1) % step == 0) for layer in hf.layer_range(fields)])
    if not isinstance(listed, list):
        raise unsupported_key("moe_layers", listed, "a list of layers such as [1, 3]")
    return to_moe_layers([int(layer in listed) for layer in hf.layer_range(fields)])


def write_expert_layers(config: TransformerConfig) -> dict[str, Any]:
    """The keys of `read_expert_layers`."""
    return {"moe_layers": [layer for layer, mark in enumerate(list_expert_layers(config)) if mark]}


def read_expert_span(values: Values, fields: Values) -> dict[str, Any]:
    """Experts in every `moe_layer_interval`-th layer from `moe_layer_start_index` to `moe_layer_end_index`."""
    step, first, last = (values.get(f"moe_layer_{key}") for key in ("interval", "start_index", "end_index"))
    if not isinstance(first, int) or not isinstance(last, int):
        raise unsupported_key("moe_layer_start_index", first, "a whole number, and one for moe_layer_end_index")
    every, last = hf.check_count("moe_layer_interval", step), last if last >= 0 else len(hf.layer_range(fields)) - 1
    return to_moe_layers([int((layer + 1) % every == 0 and first <= layer <= last) for layer in hf.layer_range(fields)])


def write_expert_span(config: TransformerConfig) -> dict[str, Any]:
    """The keys of `read_expert_span`, for consecutive layers with experts."""
    with_experts = [layer for layer, mark in enumerate(list_expert_layers(config)) if mark] or [config.n_layer]
    return {
        "moe_layer_interval": 1,
        "moe_layer_start_index": with_experts[0],
        "moe_layer_end_index": with_experts[-1],
    }


def read_groups(values: Values, _fields: Values, *, best: int, method: str | None = None) -> dict[str, Any]:
    """The limit on groups of experts.

    Args:
        best: number of scores of a group that are summed.
        method: the value of `topk_method` with which the limit applies.
    """
    groups = values.get("n_group")
    if (method is not None and values.get("topk_method") != method) or groups in (None, 1):
        return {}
    return {"n_expert_groups": groups, "n_topk_groups": values.get("topk_group"), "n_topk_scores_per_group": best}


def write_groups(config: TransformerConfig, *, method: str | None = None, **_: Any) -> dict[str, Any]:
    """The keys of `read_groups`."""
    groups = config.n_expert_groups or 1
    written: dict[str, Any] = {"n_group": groups, "topk_group": config.n_topk_groups if groups > 1 else 1}
    if method is not None:
        written["topk_method"] = method if groups > 1 else "greedy"
    return written


def read_latent(values: Values, _fields: Values, *, norm_eps: float) -> dict[str, Any]:
    """The sizes of latent attention, under the same keys; the epsilon of its norms has no key."""
    sizes = {key: values.get(key) for key in sorted(LATENT_SIZES)}
    return {"latent_attention": {**sizes, "norm_eps": norm_eps}, "head_size": values.get("qk_rope_head_dim")}


def write_latent(config: TransformerConfig, **_: Any) -> dict[str, Any]:
    """The keys of `read_latent`, and the size that transformers' rotary embedding needs."""
    sizes = config.latent_attention or dict.fromkeys(LATENT_SIZES)
    return {**{key: sizes[key] for key in sorted(LATENT_SIZES)}, "head_dim": sizes["qk_rope_head_dim"]}


def read_chunks(values: Values, fields: Values) -> dict[str, Any]:
    """Layers with chunked attention; without `layer_types`, those with rotary embeddings."""
    size, types = values.get("attention_chunk_size"), values.get("layer_types")
    chunked = fields.get("rope_layers") or [1] * len(hf.layer_range(fields))
    if types is not None:
        chunked = hf.parse_layer_kinds("layer_types", types, fields, {CHUNKED: 1, hf.GLOBAL: 0})
    if size is None or not any(chunked):
        return {}
    indices = {} if all(chunked) else {"sliding_window_indices": chunked}
    return {"window_type": "chunked", "sliding_window_size": size, **indices}


def write_chunks(config: TransformerConfig) -> dict[str, Any]:
    """The keys of `read_chunks`."""
    kinds = [CHUNKED if config.is_local(layer) else hf.GLOBAL for layer in range(config.n_layer)]
    return {"attention_chunk_size": config.sliding_window_size, "layer_types": kinds}


def read_temperature(values: Values, _fields: Values, *, first: float) -> dict[str, Any]:
    """A factor on queries that grows with the position, counted from `first`."""
    if not values.get("attn_temperature_tuning"):
        return {}
    settings = {"floor_scale": values.get("floor_scale"), "scale": values.get("attn_scale"), "first_position": first}
    return {"query_temperature": settings}


def write_temperature(config: TransformerConfig, **_: Any) -> dict[str, Any]:
    """The keys of `read_temperature`."""
    settings = config.query_temperature
    if settings is None:
        return {"attn_temperature_tuning": False}
    scales = {"floor_scale": settings["floor_scale"], "attn_scale": settings["scale"]}
    return {"attn_temperature_tuning": True, **scales}


def normalize_expert_fields(config: TransformerConfig) -> dict[str, Any]:
    """The fields of experts and latent attention in a form that is equal if they compute the same."""
    attention: dict[str, Any] = {}
    if config.latent_attention is not None:
        attention = {
            "attention_scores_scalar": config.attention_scores_scalar,
            **dict.fromkeys(("head_size", "rotary_percentage", "norm_qk", "norm_qk_type")),
        }
    if config.mlp_class_name != "LLaMAMoE":
        return attention
    with_experts = list_expert_layers(config)
    grouped = (config.n_expert_groups or 1) > 1
    late = config.router_softmax == "after_top_k" or config.norm_topk_prob  # both give the same result
    soft = config.router_score == "softmax"
    return {
        **attention,
        "first_k_dense_replace": None,
        "moe_layers": with_experts,
        "moe_intermediate_size": config.expert_size,
        "intermediate_size": None if all(with_experts) else config.intermediate_size,
        "n_shared_expert": None,
        "shared_expert_size": config.shared_size,
        "shared_expert_gate": config.shared_size > 0 and config.shared_expert_gate,
        "router_softmax": late if soft else None,
        "norm_topk_prob": None if soft else config.norm_topk_prob,
        **({} if grouped else {"n_expert_groups": None, "n_topk_groups": None, "n_topk_scores_per_group": None}),
    }


EXPERT_TRANSLATIONS = {
    "either": Translation(read_either, write_either),
    "sparse_step": Translation(read_sparse_step, write_sparse_step),
    "expert_layers": Translation(read_expert_layers, write_expert_layers),
    "expert_span": Translation(read_expert_span, write_expert_span),
    "groups": Translation(read_groups, write_groups),
    "latent": Translation(read_latent, write_latent),
    "chunks": Translation(read_chunks, write_chunks),
    "temperature": Translation(read_temperature, write_temperature),
}
