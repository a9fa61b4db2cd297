"""The fields of a model's configuration: those of LitGPT and further ones, with checks of their values."""

import difflib
import math
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from typing import Any, Literal, get_type_hints

from litgpt.model.audio_config import AudioShape
from litgpt.model.field_checks import check_type, field_error, parse_number
from litgpt.model.tower_config import TowerShape

# The largest plausible value of each field.
LIMITS = {
    "block_size": 2**31,
    "n_layer": 10_000,
    "n_embd": 2**20,
    "vocab_size": 2**26,
    "padded_vocab_size": 2**26,
    "padding_multiple": 2**20,
    "n_head": 2**16,
    "n_query_groups": 2**16,
    "head_size": 2**16,
    "intermediate_size": 2**24,
    "moe_intermediate_size": 2**24,
    "shared_expert_size": 2**24,
    "sliding_window_size": 2**31,
}
POSITIVE = (
    "norm_eps",
    "rope_base",
    "rope_local_base_freq",
    "rope_condense_ratio",
    "attention_scores_scalar",
    "rotary_percentage",
    "attention_logit_softcapping",
    "final_logit_softcapping",
    "embedding_scale",
    "residual_scale",
    "logit_scale",
    "routed_scaling_factor",
)
# The required and the optional keys of `rope_adjustments` for each kind of scaling.
ROPE_KINDS = {
    "linear": ({"factor"}, set()),
    "dynamic": ({"factor", "original_max_seq_len"}, set()),
    "llama3": ({"factor", "low_freq_factor", "high_freq_factor", "original_max_seq_len"}, set()),
    "yarn": (
        {"factor", "beta_fast", "beta_slow", "original_max_seq_len"},
        {"mscale", "mscale_all_dim", "attention_factor", "truncate"},
    ),
    "longrope": ({"short_factor", "long_factor", "original_max_seq_len"}, {"factor", "attention_factor"}),
}
LATENT_SIZES = {"q_lora_rank", "kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"}
TEMPERATURE = {"floor_scale", "scale", "first_position"}
LOGIT_FIELDS = ("tie_embeddings", "lm_head_bias", "final_logit_softcapping", "logit_scale", "n_prediction_layers")
"""The fields of logits and further predictions, which a model with the output `score` does not have."""
PER_LAYER = ("sliding_window_indices", "rope_indices", "rope_layers", "moe_layers")


@dataclass(init=False)
class TransformerConfig:
    """The configuration of a decoder; names, order and defaults are LitGPT's, further fields follow at the end.

    Sizes are in elements, `block_size` in tokens. None is derived: `padded_vocab_size` is `vocab_size` rounded up,
    `head_size = n_embd / n_head`, `n_query_groups = n_head`, `intermediate_size = 4 n_embd`.

    Raises:
        UserError: naming the field, its value and a valid one.
    """

    name: str = ""
    hf_config: dict[str, Any] = field(default_factory=dict)
    block_size: int = 4096
    n_layer: int = 16
    n_embd: int = 4096
    vocab_size: int = 50254
    padding_multiple: int = 512
    padded_vocab_size: int | None = None
    norm_class_name: Literal[
        "LayerNorm", "ScaleLayerNorm", "BareLayerNorm", "OffsetLayerNorm", "RMSNorm", "OffsetRMSNorm"
    ] = "LayerNorm"
    norm_eps: float = 1e-5
    norm_qk: bool = False
    norm_qk_type: Literal["default", "olmo2", "per_head", "per_head_bias", "after_rope", "l2_after_rope"] = "default"
    post_attention_norm: bool = False
    post_mlp_norm: bool = False
    parallel_residual: bool = True
    shared_attention_norm: bool = False
    n_head: int = 32
    head_size: int | None = None
    n_query_groups: int | None = None
    attn_bias: bool = False
    attention_scores_scalar: float | None = None
    sliding_window_size: int | None = None
    sliding_window_indices: list[int] | None = None
    attention_logit_softcapping: float | None = None
    rope_base: float = 10000
    rotary_percentage: float = 0.25
    rope_condense_ratio: float = 1
    rope_adjustments: dict[str, Any] | None = None
    rope_interleave: bool = False
    intermediate_size: int | None = None
    moe_intermediate_size: int | None = None
    bias: bool = True
    mlp_class_name: Literal["GptNeoxMLP", "LLaMAMLP", "GemmaMLP", "LLaMAMoE"] = "GptNeoxMLP"
    gelu_approximate: Literal["none", "tanh"] = "none"
    n_expert: int = 0
    n_shared_expert: int | None = None
    n_expert_groups: int | None = None
    n_topk_groups: int | None = None
    n_topk_scores_per_group: int | None = None
    n_expert_per_token: int = 0
    first_k_dense_replace: int | None = None
    routed_scaling_factor: float = 1.0
    norm_topk_prob: bool = False
    scale_embeddings: bool = False
    lm_head_bias: bool = False
    final_logit_softcapping: float | None = None
    norm_1: bool = True
    norm_2: bool = True
    latent_attention: dict[str, Any] | None = None
    rope_local_base_freq: float | None = None
    rope_indices: list[int] | None = None
    # Not in LitGPT.
    tie_embeddings: bool = False
    dropout: float = 0.0
    position_embedding: Literal["rotary", "learned"] = "rotary"
    activation: Literal["relu", "relu_squared", "silu", "clamped_swiglu"] | None = None
    attn_out_bias: bool | None = None
    mlp_bias: bool | None = None
    attention_sinks: bool = False
    window_type: Literal["sliding", "chunked"] = "sliding"
    rope_layers: list[int] | None = None
    query_temperature: dict[str, float] | None = None
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    moe_layers: list[int] | None = None
    router_score: Literal["softmax", "sigmoid", "sqrtsoftplus"] = "softmax"
    router_softmax: Literal["after_top_k", "before_top_k"] = "after_top_k"
    router_bias: bool = False
    router_correction: bool = False
    router_weights: Literal["output", "input"] = "output"
    expert_bias: bool = False
    shared_expert_size: int | None = None
    shared_expert_gate: bool = False
    output: Literal["logits", "score"] = "logits"
    n_prediction_layers: int = 0
    rope_sections: list[int] | None = None
    rope_section_order: Literal["blocks", "in_turn"] = "blocks"
    vision: dict[str, Any] | None = None
    audio: dict[str, Any] | None = None

    def __init__(self, **values: Any) -> None:
        entries = {entry.name: entry for entry in fields(self)}
        for key in values:
            if key not in entries:
                near = difflib.get_close_matches(str(key), entries, 1)
                raise field_error(key, "unknown field", f"did you mean {near[0]}?" if near else "remove it")
        types = field_types()
        for key, entry in entries.items():
            default = {} if key == "hf_config" else entry.default
            setattr(self, key, check_type(key, values[key], types[key]) if key in values else default)
        if self.n_expert_groups and "router_score" not in values:  # LitGPT has one router with groups
            self.router_score, self.router_correction = "sigmoid", True
        self._check_numbers()
        self._check_rope()
        self._check_layers()
        self._check_latent()
        self._check_experts()
        if self.output == "score":
            for key in LOGIT_FIELDS:
                setattr(self, key, entries[key].default)
        self._resolve()
        self._check_towers()

    def _check_numbers(self) -> None:
        for key, limit in LIMITS.items():
            value = getattr(self, key)
            if value is not None and not 1 <= value <= limit:
                raise field_error(key, f"{value} is out of range", f"use 1 to {limit}")
        for key in POSITIVE:
            value = getattr(self, key)
            if value is not None and not 0 < value < math.inf:
                raise field_error(key, f"{value} is not positive", "use e.g. 1")
        if not 0 <= self.n_prediction_layers <= 64:
            raise field_error("n_prediction_layers", f"{self.n_prediction_layers} is out of range", "use 0 to 64")
        if self.n_prediction_layers and self.position_embedding == "learned":
            problem = f"{self.n_prediction_layers} with position_embedding: learned"
            raise field_error("n_prediction_layers", problem, "use 0, or position_embedding: rotary")
        if self.rotary_percentage > 1:
            raise field_error("rotary_percentage", f"{self.rotary_percentage} is above 1", "use e.g. 1.0")
        if not 0 <= self.dropout < 1:
            raise field_error("dropout", f"{self.dropout} is not in [0, 1)", "use e.g. 0.1")

    def _check_rope(self) -> None:
        if self.rope_adjustments is None:
            return
        self.rope_adjustments = rope = dict(self.rope_adjustments)
        if self.rope_kind is None:
            kinds = "; ".join(f"{kind} {sorted(needed)}" for kind, (needed, _) in ROPE_KINDS.items())
            raise field_error("rope_adjustments", f"{sorted(rope)} is not a kind of scaling", f"use one of {kinds}")
        for key, value in rope.items():
            rope[key] = [parse_number(x) for x in value] if isinstance(value, list) else parse_number(value)
            for number in rope[key] if isinstance(rope[key], list) else [rope[key]]:
                if not isinstance(number, int | float) or not 0 <= number < math.inf:
                    message = f"{key}: {number!r} is not a positive number"
                    raise field_error("rope_adjustments", message, "use e.g. factor: 8.0")
        if rope.get("factor", 1) <= 0:
            raise field_error("rope_adjustments", f"factor: {rope['factor']} is not positive", "use e.g. factor: 8.0")
        if "low_freq_factor" in rope and rope["high_freq_factor"] < rope["low_freq_factor"]:
            raise field_error("rope_adjustments", "high_freq_factor is below low_freq_factor", "use e.g. 4 and 1")

    def _check_layers(self) -> None:
        """Check that lists per layer have a 0 or 1 for every layer; longer lists are truncated, as in LitGPT."""
        for key in PER_LAYER:
            marks = getattr(self, key)
            if marks is None:
                continue
            if len(marks) < self.n_layer or any(mark not in (0, 1) for mark in marks):
                raise field_error(key, f"{marks} is not one 0 or 1 for each of {self.n_layer} layers", "list them all")
            setattr(self, key, [int(mark) for mark in marks[: self.n_layer]])
        if self.sliding_window_indices is not None and self.sliding_window_size is None:
            raise field_error("sliding_window_indices", "requires sliding_window_size", "set e.g. 4096")
        if self.rope_indices is not None and self.rope_local_base_freq is None:
            raise field_error("rope_indices", "requires rope_local_base_freq", "set e.g. 10000")
        if self.query_temperature is not None and set(self.query_temperature) != TEMPERATURE:
            raise field_error("query_temperature", f"{self.query_temperature}", f"use the keys {sorted(TEMPERATURE)}")

    def _check_latent(self) -> None:
        if self.latent_attention is None:
            return
        self.latent_attention = sizes = dict(self.latent_attention)
        if set(sizes) - {"norm_eps"} != LATENT_SIZES:
            raise field_error("latent_attention", f"{sorted(sizes)} are not its keys", f"use {sorted(LATENT_SIZES)}")
        sizes["norm_eps"] = eps = parse_number(sizes.get("norm_eps", self.norm_eps))
        if not isinstance(eps, int | float) or not 0 < eps < 1:
            raise field_error("latent_attention", f"norm_eps: {eps!r} is not an epsilon", "use e.g. 1e-6")
        for key in LATENT_SIZES:
            size = sizes[key]
            if not (size is None and key == "q_lora_rank") and not (isinstance(size, int) and 0 < size <= 2**20):
                raise field_error("latent_attention", f"{key}: {size!r} is not a size", "use a positive integer")
        if self.n_query_groups not in (None, self.n_head):
            raise field_error("n_query_groups", f"{self.n_query_groups} with latent_attention", f"use {self.n_head}")

    def _check_experts(self) -> None:
        experts, topk, kind = self.n_expert, self.n_expert_per_token, self.mlp_class_name
        if kind != "LLaMAMoE":
            if experts:
                raise field_error("n_expert", f"{experts} with mlp_class_name {kind}", "use LLaMAMoE")
            return
        if not 1 <= experts <= 2**16:
            raise field_error("n_expert", f"{experts} with mlp_class_name {kind}", "use e.g. 8")
        if not 1 <= topk <= experts:
            raise field_error("n_expert_per_token", f"{topk} of {experts} experts", "use e.g. 2")
        groups, topk_groups, best = self.n_expert_groups, self.n_topk_groups, self.n_topk_scores_per_group
        if groups is None:
            return
        if groups < 1 or experts % groups:
            raise field_error("n_expert_groups", f"{groups} does not divide n_expert {experts}", "use e.g. 1")
        if topk_groups is None or not 1 <= topk_groups <= groups:
            raise field_error("n_topk_groups", f"{topk_groups} of {groups} groups", f"use 1 to {groups}")
        if topk > topk_groups * experts // groups:
            selected = f"{topk} experts out of {topk_groups} of {groups} groups of {experts}"
            raise field_error("n_expert_per_token", selected, "use fewer, or more n_topk_groups")
        if best not in (1, 2) or best > experts // groups:
            raise field_error("n_topk_scores_per_group", f"{best} of {experts // groups} in a group", "use 1 or 2")

    def _resolve(self) -> None:
        """Derive the sizes that are None, and check sizes against each other."""
        if self.head_size is None:
            if self.n_embd % self.n_head:
                near = self.n_head * max(1, round(self.n_embd / self.n_head))
                raise field_error("n_embd", f"{self.n_embd} is not divisible by n_head {self.n_head}", f"use {near}")
            self.head_size = self.n_embd // self.n_head
        self.n_query_groups = self.n_query_groups or self.n_head
        if self.n_head % self.n_query_groups:
            raise field_error("n_query_groups", f"{self.n_query_groups} does not divide n_head {self.n_head}", "use 1")
        if self.position_embedding == "rotary" and self.rotary_size % 2:
            rotated = f"rotates {self.rotary_size} features of a head of {self.head_size}, an odd number"
            problem = f"{self.rotary_percentage} {rotated}"
            raise field_error("rotary_percentage", problem, "set 0.5, 1 or another head_size")
        for key in ("short_factor", "long_factor"):
            factors = (self.rope_adjustments or {}).get(key)
            if factors is not None and (not isinstance(factors, list) or len(factors) != self.rotary_size // 2):
                count = len(factors) if isinstance(factors, list) else 1
                message = f"{key} has {count} numbers for {self.rotary_size // 2} pairs"
                raise field_error("rope_adjustments", message, "list one for each")
        if self.intermediate_size is None:
            if self.mlp_class_name != "GptNeoxMLP":
                problem = f"{self.mlp_class_name} requires it"
                raise field_error("intermediate_size", problem, f"use e.g. {4 * self.n_embd}")
            self.intermediate_size = 4 * self.n_embd
        if self.padded_vocab_size is None:
            self.padded_vocab_size = math.ceil(self.vocab_size / self.padding_multiple) * self.padding_multiple
        self.vocab_size = min(self.vocab_size, self.padded_vocab_size)
        if self.shared_attention_norm and not self.parallel_residual:
            raise field_error("shared_attention_norm", "true requires parallel_residual: true", "use false")
        if self.tie_embeddings and self.lm_head_bias:
            raise field_error("lm_head_bias", "true is not supported with tie_embeddings: true", "use false")

    def _check_towers(self) -> None:
        if self.vision is not None:
            shape = TowerShape.from_values(self.vision)
            self.vision = shape.to_dict()
            if len(shape.deep_layers or []) > self.n_layer:
                problem = f"{shape.deep_layers} are more than the {self.n_layer} layers that add their features"
                raise field_error("vision.deep_layers", problem, f"list {self.n_layer} or fewer")
        if self.audio is not None:
            self.audio = AudioShape.from_values(self.audio).to_dict()
            if (self.vision or {}).get("deep_layers"):
                problem = f"{(self.vision or {})['deep_layers']} with an audio tower"
                raise field_error("vision.deep_layers", problem, "leave out audio")
        sections = self.rope_sections
        if sections is not None and (len(sections) != 3 or sum(sections) != self.rotary_size // 2 or min(sections) < 0):
            problem = f"{sections} are not three numbers of pairs, {self.rotary_size // 2} in all"
            raise field_error("rope_sections", problem, "list those of time, row and column")
        if sections is not None and self.rope_section_order == "in_turn" and max(sections[1:]) > sections[0]:
            problem = f"{sections} have no pair of time for each of row and column"
            raise field_error("rope_sections", problem, "list the largest first, or set rope_section_order: blocks")

    @property
    def has_tower(self) -> bool:
        """Whether the model has a vision or an audio tower."""
        return self.vision is not None or self.audio is not None

    @property
    def has_prompt_blocks(self) -> bool:
        """Whether the tokens of a prompt attend to each other, also to later ones."""
        return self.vision is not None and bool(self.vision["prompt_blocks"])

    @property
    def n_blocks(self) -> int:
        """Number of blocks: the layers, and the prediction layers after them."""
        return self.n_layer + self.n_prediction_layers

    @property
    def rotary_size(self) -> int:
        """Number of features of a head that are rotated by position."""
        if self.latent_attention is not None:
            return self.latent_attention["qk_rope_head_dim"]
        assert self.head_size is not None
        return int(self.rotary_percentage * self.head_size)

    @property
    def rope_kind(self) -> str | None:
        """The kind of rope scaling, by the keys of `rope_adjustments`; None without scaling."""
        keys = set(self.rope_adjustments or ())
        kinds = (kind for kind, (required, more) in ROPE_KINDS.items() if required <= keys <= required | more)
        return next(kinds, None)

    @property
    def expert_size(self) -> int:
        """The intermediate size of each expert."""
        assert self.intermediate_size is not None
        return self.moe_intermediate_size or self.intermediate_size

    @property
    def shared_size(self) -> int:
        """The total intermediate size of the shared experts; 0 if there are none."""
        return self.shared_expert_size or (self.n_shared_expert or 0) * self.expert_size

    def is_local(self, layer: int) -> bool:
        """Whether the attention of the layer is limited to `sliding_window_size` tokens."""
        return self.sliding_window_size is not None and self._is_marked(self.sliding_window_indices, layer)

    def rope_of(self, layer: int) -> Literal["global", "local"] | None:
        """Which of the two rotary embeddings the layer uses; None if it uses none."""
        if self.position_embedding != "rotary" or not self._is_marked(self.rope_layers, layer):
            return None
        local = self.rope_local_base_freq is not None and self._is_marked(self.rope_indices, layer)
        return "local" if local else "global"

    def has_experts(self, layer: int) -> bool:
        """Whether the layer's feed-forward is a mixture of experts."""
        if self.mlp_class_name != "LLaMAMoE" or layer < (self.first_k_dense_replace or 0):
            return False
        return self._is_marked(self.moe_layers, layer)

    def _is_marked(self, marks: list[int] | None, layer: int) -> bool:
        """Whether a list per layer marks a layer, as one without list does; prediction layers are as the last layer."""
        return marks is None or marks[min(layer, self.n_layer - 1)] == 1

    def to_dict(self) -> dict[str, Any]:
        """All fields, as for `Config(**values)` and a `model_config.yaml`."""
        return asdict(self)


@cache
def field_types() -> dict[str, Any]:
    """The declared type of each field."""
    return get_type_hints(TransformerConfig)
