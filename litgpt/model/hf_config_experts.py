"""How a `config.json` tells of experts and latent attention: the translations of `config_json` that concern them."""

from typing import Any

from litgpt.model.hf_config_values import Translation, Values, layers_in, marks, unsupported, whole
from litgpt.model.transformer_config import LATENT_SIZES, TransformerConfig

CHUNKED, GLOBAL = "chunked_attention", "full_attention"


def expert_marks(config: TransformerConfig) -> list[int]:
    """1 for each layer with experts."""
    return [int(config.has_experts(layer)) for layer in range(config.n_layer)]


def marked(with_experts: list[int]) -> dict[str, Any]:
    """`moe_layers`, unless every layer has experts."""
    return {} if all(with_experts) else {"moe_layers": with_experts}


def read_either(values: Values, ours: Values, **keys: list[str]) -> dict[str, Any]:
    """A field that has had several keys: the first that is there."""
    return {
        ours: next((values[key] for key in names if values.get(key) is not None), None) for ours, names in keys.items()
    }


def write_either(config: TransformerConfig, **keys: list[str]) -> dict[str, Any]:
    """The first key of each field."""
    return {names[0]: getattr(config, ours) for ours, names in keys.items()}


def read_sparse_step(values: Values, ours: Values) -> dict[str, Any]:
    """Experts in one layer of `decoder_sparse_step`, the last of them, but for `mlp_only_layers`."""
    step, dense = whole("decoder_sparse_step", values.get("decoder_sparse_step")), values.get("mlp_only_layers") or []
    if not isinstance(dense, list):
        raise unsupported("mlp_only_layers", dense, "a list of layers such as [0]")
    return marked([int((layer + 1) % step == 0 and layer not in dense) for layer in layers_in(ours)])


def write_sparse_step(config: TransformerConfig) -> dict[str, Any]:
    """The keys of `read_sparse_step`."""
    dense = [layer for layer, mark in enumerate(expert_marks(config)) if not mark]
    return {"decoder_sparse_step": 1, "mlp_only_layers": dense}


def read_expert_layers(values: Values, ours: Values) -> dict[str, Any]:
    """Experts in the layers that `moe_layers` lists, else in one of `interleave_moe_layer_step`, the last of them."""
    listed = values.get("moe_layers")
    if listed is None:
        step = whole("interleave_moe_layer_step", values.get("interleave_moe_layer_step"))
        return marked([int((layer + 1) % step == 0) for layer in layers_in(ours)])
    if not isinstance(listed, list):
        raise unsupported("moe_layers", listed, "a list of layers such as [1, 3]")
    return marked([int(layer in listed) for layer in layers_in(ours)])


def write_expert_layers(config: TransformerConfig) -> dict[str, Any]:
    """The keys of `read_expert_layers`."""
    return {"moe_layers": [layer for layer, mark in enumerate(expert_marks(config)) if mark]}


def read_expert_span(values: Values, ours: Values) -> dict[str, Any]:
    """Experts in one of `moe_layer_interval` layers from `moe_layer_start_index` to `moe_layer_end_index`."""
    step, first, last = (values.get(f"moe_layer_{key}") for key in ("interval", "start_index", "end_index"))
    if not isinstance(first, int) or not isinstance(last, int):
        raise unsupported("moe_layer_start_index", first, "a whole number, and one for moe_layer_end_index")
    every, last = whole("moe_layer_interval", step), last if last >= 0 else len(layers_in(ours)) - 1
    return marked([int((layer + 1) % every == 0 and first <= layer <= last) for layer in layers_in(ours)])


def write_expert_span(config: TransformerConfig) -> dict[str, Any]:
    """The keys of `read_expert_span`, for layers with experts that follow each other."""
    with_experts = [layer for layer, mark in enumerate(expert_marks(config)) if mark] or [config.n_layer]
    return {
        "moe_layer_interval": 1,
        "moe_layer_start_index": with_experts[0],
        "moe_layer_end_index": with_experts[-1],
    }


def read_groups(values: Values, ours: Values, *, best: int, method: str | None = None) -> dict[str, Any]:
    """The limit on groups of experts.

    Args:
        best: how many scores of a group are summed up.
        method: the value of `topk_method` that a limit needs.
    """
    groups = values.get("n_group")
    if (method is not None and values.get("topk_method") != method) or groups in (None, 1):
        return {}
    return {"n_expert_groups": groups, "n_topk_groups": values.get("topk_group"), "n_topk_scores_per_group": best}


def write_groups(config: TransformerConfig, *, best: int, method: str | None = None) -> dict[str, Any]:
    """The keys of `read_groups`."""
    groups = config.n_expert_groups or 1
    written: dict[str, Any] = {"n_group": groups, "topk_group": config.n_topk_groups if groups > 1 else 1}
    if method is not None:
        written["topk_method"] = method if groups > 1 else "greedy"
    return written


def read_latent(values: Values, ours: Values, *, norm_eps: float) -> dict[str, Any]:
    """The sizes of latent attention, whose keys have our names; its norms have an epsilon that no key tells."""
    sizes = {key: values.get(key) for key in sorted(LATENT_SIZES)}
    return {"latent_attention": {**sizes, "norm_eps": norm_eps}, "head_size": values.get("qk_rope_head_dim")}


def write_latent(config: TransformerConfig, *, norm_eps: float) -> dict[str, Any]:
    """The keys of `read_latent`, and the size that transformers' rotary embedding asks for."""
    sizes = config.latent_attention or dict.fromkeys(LATENT_SIZES)
    return {**{key: sizes[key] for key in sorted(LATENT_SIZES)}, "head_dim": sizes["qk_rope_head_dim"]}


def read_chunks(values: Values, ours: Values) -> dict[str, Any]:
    """Which layers see the chunk of positions that they are in only; without a list, those that rotate by position."""
    size, types = values.get("attention_chunk_size"), values.get("layer_types")
    found = ours.get("rope_layers") or [1] * len(layers_in(ours))
    if types is not None:
        found = marks("layer_types", types, ours, {CHUNKED: 1, GLOBAL: 0})
    if size is None or not any(found):
        return {}
    indices = {} if all(found) else {"sliding_window_indices": found}
    return {"window_type": "chunked", "sliding_window_size": size, **indices}


def write_chunks(config: TransformerConfig) -> dict[str, Any]:
    """The keys of `read_chunks`."""
    kinds = [CHUNKED if config.is_local(layer) else GLOBAL for layer in range(config.n_layer)]
    return {"attention_chunk_size": config.sliding_window_size, "layer_types": kinds}


def read_temperature(values: Values, ours: Values, *, first: float) -> dict[str, Any]:
    """A factor on queries that grows with the position, counted from `first`."""
    if not values.get("attn_temperature_tuning"):
        return {}
    settings = {"floor_scale": values.get("floor_scale"), "scale": values.get("attn_scale"), "first_position": first}
    return {"query_temperature": settings}


def write_temperature(config: TransformerConfig, *, first: float) -> dict[str, Any]:
    """The keys of `read_temperature`."""
    settings = config.query_temperature
    if settings is None:
        return {"attn_temperature_tuning": False}
    said = {"floor_scale": settings["floor_scale"], "attn_scale": settings["scale"]}
    return {"attn_temperature_tuning": True, **said}


def normalize_expert_fields(config: TransformerConfig) -> dict[str, Any]:
    """What the fields of experts and latent attention compute, the same for all ways of saying it."""
    found: dict[str, Any] = {}
    if config.latent_attention is not None:
        found = {
            "attention_scores_scalar": config.attention_scores_scalar,
            **dict.fromkeys(("head_size", "rotary_percentage", "norm_qk", "norm_qk_type")),
        }
    if config.mlp_class_name != "LLaMAMoE":
        return found
    with_experts = expert_marks(config)
    grouped = (config.n_expert_groups or 1) > 1
    late = config.router_softmax == "after_top_k" or config.norm_topk_prob  # two ways to one result
    soft = config.router_score == "softmax"
    return {
        **found,
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
