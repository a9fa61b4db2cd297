"""Causal self-attention with grouped keys and values.

Axes: B batch, H heads, K key-value heads, T tokens (query), U tokens (key), S numbers of a head, D model width.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from litgpt.model.attention_inputs import AttentionInputs, Mask, Segment
from litgpt.model.config import Config
from litgpt.model.cpu_attention import FlashAttention, is_faster_on_cpu, is_flash_on_cpu
from litgpt.model.flex_attention import BlockMask, attend_blocks
from litgpt.model.layers import build_head_norm, build_norm
from litgpt.model.rotary import apply_rotary

Keys = Tensor | Sequence[Tensor]
"""Keys or values, (B, K, U, S); or, of a cache with many texts, (texts, K, U, S) for each segment of queries."""


class KVCacheLayer(Protocol):
    """The keys and values of one layer for the tokens so far."""

    def append(self, k_BKTS: Tensor, v_BKTS: Tensor) -> tuple[Keys, Keys]:
        """Append those of the next tokens; returns all keys and values, the new ones last."""

    def attend(self, attention: "CachedAttention", q: Tensor, k: Tensor, v: Tensor, inputs: AttentionInputs) -> Tensor:
        """`attention.attend_cached` for this cache, here or wherever else the keys and values are."""
        return attention.attend_cached(q, k, v, inputs, self)


class CachedAttention(Protocol):
    """Attention of a layer that appends to a cache."""

    value_size: int

    def attend_cached(
        self, q_BHTS: Tensor, k_BKTS: Tensor, v_BKTS: Tensor, inputs: AttentionInputs, cache: KVCacheLayer
    ) -> Tensor:
        """Append to the cache, and attend to the tokens in it that `inputs` allow; (B, H, T, S of the values)."""


class KVCache(Protocol):
    """The keys and values of all layers, for `length` tokens."""

    length: int

    @property
    def layers(self) -> Sequence[KVCacheLayer]:
        """The keys and values of each layer."""

    def advance(self, tokens: int) -> None:
        """Count tokens that every layer has appended."""


class Attention(nn.Module):
    """Self-attention over (B, T, D); it has as many heads as its tensors, which may be some of the model's."""

    projections = ("q", "k", "v")
    """The linear layers of `project`."""

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        assert config.head_size is not None and config.n_query_groups is not None
        self.head_size = self.value_size = config.head_size
        self.scale = (config.attention_scores_scalar or config.head_size) ** -0.5
        self.softcap = config.attention_logit_softcapping
        self.window = "local" if config.is_local(layer) else "global"
        self.rope = config.rope_of(layer)
        self.interleave = config.rope_interleave
        is_scaled = config.rope_layers is None or self.rope is None
        self.has_temperature = config.query_temperature is not None and is_scaled
        bias = config.bias or config.attn_bias
        out_bias = config.bias if config.attn_out_bias is None else config.attn_out_bias
        self.q = nn.Linear(config.n_embd, config.n_head * config.head_size, bias=bias)
        self.k = nn.Linear(config.n_embd, config.n_query_groups * config.head_size, bias=bias)
        self.v = nn.Linear(config.n_embd, config.n_query_groups * config.head_size, bias=bias)
        self.out = nn.Linear(config.n_head * config.head_size, config.n_embd, bias=out_bias)
        self.sinks = nn.Parameter(torch.zeros(config.n_head)) if config.attention_sinks else None
        self.norm_kind = config.norm_qk_type if config.norm_qk else None
        self.norm_q = build_qk_norm(config, config.n_head, self.norm_kind)
        self.norm_k = build_qk_norm(config, config.n_query_groups, self.norm_kind)
        self.eps = config.norm_eps

    def forward(self, x_BTD: Tensor, inputs: AttentionInputs, cache: KVCacheLayer | None = None) -> Tensor:
        """Attend to the tokens that `inputs` allow, those in the cache included; (B, T, D)."""
        q, k, v = self.project(x_BTD)
        if self.norm_kind == "olmo2":
            q, k = self.norm_q(q), self.norm_k(k)
        q, k, v = (x.view(*x.shape[:-1], -1, self.head_size) for x in (q, k, v))
        if self.norm_kind in ("default", "per_head", "per_head_bias"):
            q, k = self.norm_q(q), self.norm_k(k)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        q, k = self._apply_rotary(q, k, inputs)
        if self.has_temperature and inputs.temperature is not None:
            q = (q * inputs.temperature).to(q.dtype)
        if cache is None:
            output = self.core_attention(q, k, v, inputs, self.sinks)
        else:
            output = cache.attend(self, q, k, v, inputs)
        return self.out(output.transpose(1, 2).flatten(2))

    def project(self, x_BTD: Tensor) -> Sequence[Tensor]:
        """Queries (B, T, H S), keys and values (B, T, K S), before norms and rotation."""
        return self.q(x_BTD), self.k(x_BTD), self.v(x_BTD)

    def core_attention(
        self, q_BHTS: Tensor, k_BKUS: Keys, v_BKUS: Keys, inputs: AttentionInputs, sinks: Tensor | None
    ) -> Tensor:
        """Attention without its projections, (B, H, T, S)."""
        settings: dict[str, Any] = {"window": self.window, "scale": self.scale, "softcap": self.softcap}
        return apply_attention(inputs, q_BHTS, k_BKUS, v_BKUS, sinks=sinks, **settings)

    def attend_cached(
        self, q_BHTS: Tensor, k_BKTS: Tensor, v_BKTS: Tensor, inputs: AttentionInputs, cache: KVCacheLayer
    ) -> Tensor:
        """As in `CachedAttention`."""
        keys, values = cache.append(k_BKTS, v_BKTS)
        return self.core_attention(q_BHTS, keys, values, inputs, self.sinks)

    def _apply_rotary(self, q: Tensor, k: Tensor, inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
        """Rotate queries and keys by position; some models norm them afterwards."""
        if self.rope is not None:
            cos, sin = inputs.angles[self.rope]
            q, k = (apply_rotary(x, cos, sin, interleave=self.interleave) for x in (q, k))
            if self.norm_kind == "l2_after_rope":
                q, k = (F.rms_norm(x.float(), x.shape[-1:], eps=self.eps).to(x.dtype) for x in (q, k))
        return (self.norm_q(q), self.norm_k(k)) if self.norm_kind == "after_rope" else (q, k)


def build_qk_norm(config: Config, heads: int, kind: str | None) -> nn.Module:
    """The norm of queries or keys: over each head, over all together, or with weights, and biases, of each head."""
    assert config.head_size is not None
    if kind in ("default", "after_rope"):
        return build_norm(config, config.head_size)
    if kind == "olmo2":
        return build_norm(config, heads * config.head_size)
    if kind in ("per_head", "per_head_bias"):
        return build_head_norm(config, heads, bias=kind == "per_head_bias")
    return nn.Identity()


def apply_attention(
    inputs: AttentionInputs,
    q_BHTS: Tensor,
    k_BKUS: Keys,
    v_BKUS: Keys,
    *,
    window: str,
    sinks: Tensor | None = None,
    **settings: Any,
) -> Tensor:
    """Core attention, (B, H, T, S of the values), for a kind of window; `settings` are those of `attend_segments`."""
    attention: partial[Tensor] = partial(attend_segments, inputs, window=window, **settings)
    if inputs.exchange is None:
        return attention(q_BHTS, k_BKUS, v_BKUS, sinks=sinks)
    assert isinstance(k_BKUS, Tensor) and isinstance(v_BKUS, Tensor)
    return inputs.exchange(attention, q_BHTS, k_BKUS, v_BKUS, sinks)


def attend_segments(
    inputs: AttentionInputs,
    q_BHTS: Tensor,
    k_BKUS: Keys,
    v_BKUS: Keys,
    *,
    window: str,
    attend_one: Callable[..., Tensor] | None = None,
    **settings: Any,
) -> Tensor:
    """Attend one segment after the other, or all at once; (B, H, T, S of the values).

    Args:
        attend_one: called for a segment instead of `attend`.
    """
    segments = inputs.segments
    if segments is None:
        assert isinstance(k_BKUS, Tensor) and isinstance(v_BKUS, Tensor)
        attend_all = attend_one or attend
        return attend_all(q_BHTS, k_BKUS, v_BKUS, mask=inputs.masks[window], causal=inputs.causal, **settings)
    sizes = [segment.tokens for segment in segments]
    is_joined = attend_one is None and are_documents(segments, window) and is_plain_softmax(settings)
    if is_joined and isinstance(k_BKUS, Tensor) and isinstance(v_BKUS, Tensor):
        qkv = (q_BHTS, k_BKUS, v_BKUS)
        if is_flash_on_cpu(*qkv) and not torch.compiler.is_compiling():
            return FlashAttention.apply(*qkv, settings["scale"], sizes)
    attend_one = attend_one or attend
    queries = [q_BHTS] if len(sizes) == 1 else q_BHTS.split(sizes, dim=2)
    keys, values = (split_keys(segments, x_BKUS) for x_BKUS in (k_BKUS, v_BKUS))
    outputs = []
    for segment, q, k, v in zip(segments, queries, keys, values, strict=True):
        q = split_texts(q, segment.texts)
        output = attend_one(q, k, v, mask=segment.masks[window], causal=q.shape[2] == k.shape[2], **settings)
        outputs.append(join_texts(output, segment.texts))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)


def are_documents(segments: Sequence[Segment], window: str) -> bool:
    """Whether each segment attends to the tokens of its own up to each query, without a mask."""
    return all(segment.keys is None and segment.texts == 1 and segment.masks[window] is None for segment in segments)


def is_plain_softmax(settings: Mapping[str, Any]) -> bool:
    """Whether the settings of `attend` leave scores as they are, but for the scale."""
    return settings.get("softcap") is None and settings.get("sinks") is None


def split_texts(x_BHTS: Tensor, texts: int) -> Tensor:
    """The tokens of several texts in one row, (1, H, N T, S), as (N, H, T, S)."""
    return x_BHTS if texts == 1 else x_BHTS[0].unflatten(1, (texts, -1)).transpose(0, 1)


def join_texts(x_NHTS: Tensor, texts: int) -> Tensor:
    """The tokens of several texts, (N, H, T, S), in one row, (1, H, N T, S)."""
    return x_NHTS if texts == 1 else x_NHTS.transpose(0, 1).flatten(1, 2)[None]


def split_keys(segments: Sequence[Segment], x_BKUS: Keys) -> Sequence[Tensor]:
    """The keys, or values, of each segment."""
    if not isinstance(x_BKUS, Tensor):
        return x_BKUS
    if all(segment.keys is None for segment in segments):
        return x_BKUS.split([segment.tokens for segment in segments], dim=2)
    return [x_BKUS[:, :, : segment.keys] for segment in segments]


def attend(
    q_BHTS: Tensor,
    k_BKUS: Tensor,
    v_BKUS: Tensor,
    *,
    mask: Mask | None,
    causal: bool,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Softmax attention, (B, H, T, S of the values); query head h uses key-value head h K / H.

    Args:
        mask: True where a query may attend to a key, or a block mask; None for `causal`, else for all keys.
        softcap: scores become softcap tanh(score / softcap) (Gemma 2).
        sinks: (H,), the score of each head's attention sink (gpt-oss).
    """
    if isinstance(mask, BlockMask):
        return attend_blocks(q_BHTS, k_BKUS, v_BKUS, mask=mask, scale=scale, softcap=softcap, sinks=sinks)
    is_grouped = q_BHTS.shape[1] != k_BKUS.shape[1]
    if softcap is None and sinks is None:
        if mask is None and causal and is_faster_on_cpu(q_BHTS, k_BKUS, v_BKUS):
            return torch.ops.litgpt.causal_attention(q_BHTS, k_BKUS, v_BKUS, scale)[0]
        if is_grouped and q_BHTS.shape[2] == 1 and q_BHTS.element_size() == 2 and not (mask is None and causal):
            # one query a head: those of a group share keys, which torch's CPU kernel reads once for each in 16 bits
            q_BKGS = q_BHTS.unflatten(1, (k_BKUS.shape[1], -1)).squeeze(3)
            return F.scaled_dot_product_attention(q_BKGS, k_BKUS, v_BKUS, mask, scale=scale).flatten(1, 2).unsqueeze(2)
        return F.scaled_dot_product_attention(
            q_BHTS, k_BKUS, v_BKUS, mask, is_causal=mask is None and causal, scale=scale, enable_gqa=is_grouped
        )
    q_BKGTS = q_BHTS.unflatten(1, (k_BKUS.shape[1], -1))
    scores = (q_BKGTS @ k_BKUS.unsqueeze(2).mT).flatten(1, 2) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is None and causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    upcast = torch.promote_types(scores.dtype, torch.float32)
    if sinks is not None:
        column = sinks.to(scores.dtype)[None, :, None, None].expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, column], dim=-1)
    weights = torch.softmax(scores, dim=-1, dtype=upcast).to(v_BKUS.dtype)
    weights = weights if sinks is None else weights[..., :-1]
    return (weights.unflatten(1, (k_BKUS.shape[1], -1)) @ v_BKUS.unsqueeze(2)).flatten(1, 2)
