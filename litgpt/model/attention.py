"""Causal self-attention with grouped keys and values, and what all layers of a forward pass share.

Axes: B batch, H heads, K key-value heads, T tokens (query), U tokens (key), S numbers of a head, D model width.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from litgpt.model.block_attention import BlockMask, attend_in_blocks, blocks_of
from litgpt.model.config import Config
from litgpt.model.layers import norm, scale_norm
from litgpt.model.narrow_attention import is_narrow, narrow_attention
from litgpt.model.rotary import angles, rotate


class LayerCache(Protocol):
    """The keys and values that one layer has made so far."""

    def append(self, k_BKTS: Tensor, v_BKTS: Tensor) -> tuple[Tensor, Tensor]:
        """Add those of the next tokens; all keys (B, K, U, S) and values, the new ones last."""


Mask = Tensor | BlockMask


class Cache(Protocol):
    """The keys and values of all layers, for `length` tokens."""

    length: int
    layers: Sequence[LayerCache]

    def advance(self, tokens: int) -> None:
        """Count tokens that every layer has appended."""


class Exchange(Protocol):
    """How processes that have different tokens of every row attend to one another's."""

    def own(self, whole: Tensor, dim: int) -> Tensor:
        """What there is for this process's tokens, out of what there is for all tokens along a dim."""

    def queries(self, tokens: int) -> Sequence[range] | None:
        """Where in a row of so many tokens the queries are that this process attends with; None: everywhere."""

    def check(self, shared: "Shared") -> None:
        """Refuse masks and parts that cannot be heeded."""

    def __call__(
        self, attend: partial[Tensor], q_BHTS: Tensor, k_BKTS: Tensor, v_BKTS: Tensor, sinks: Tensor | None
    ) -> Tensor:
        """What the queries of this process's tokens find in all keys, by `attend(q, k, v, sinks=)` at those places.

        The `scale` that queries are multiplied by is among the keywords of `attend`.
        """


@dataclass(frozen=True)
class Part:
    """Queries that are attended with by themselves, and their masks as `Shared` has them.

    Attributes:
        tokens: how many queries; they follow those of the part before.
        keys: they may see no more than so many of the first keys; None: the keys are those of the same tokens.
    """

    tokens: int
    masks: Mapping[str, Mask | None]
    keys: int | None = None


@dataclass(frozen=True)
class Shared:
    """What all blocks of one forward pass share.

    angles: cosine and sine for `global` and, where the shape has a second rotary embedding, `local`.
    masks: for `global` and `local` layers (B or 1, 1, T, U), True where a query may see a key; or, on an accelerator,
        the blocks of it; None: as `causal` says.
    causal: what no mask means: a query sees no later key, or (one query, cached keys) every key.
    temperature: a factor on queries by position, (1 or B, 1, T, 1), or None.
    parts: queries to attend with one after the other, such as each document of a row; None: all at once, by the masks.
    exchange: how to attend to tokens of other processes; None: all are here.
    """

    angles: Mapping[str, tuple[Tensor, Tensor]]
    masks: Mapping[str, Mask | None]
    causal: bool = True
    temperature: Tensor | None = None
    parts: tuple[Part, ...] | None = None
    exchange: Exchange | None = None


def share(
    config: Config, positions: Tensor, *, documents_BT: Tensor | None, cached: int, exchange: Exchange | None = None
) -> Shared:
    """Angles and masks for every kind of layer that the shape has.

    Args:
        positions: (B, T), or (T,) where all rows have the same; of whole rows whatever this process has of them.
        documents_BT: each token's document; attention stays inside equal numbers.
        cached: how many tokens came before.
        exchange: how to attend to tokens of other processes.
    """
    ropes = {which for which in map(config.rope_of, range(config.n_layer)) if which}
    kinds = sorted({"local" if config.is_local(layer) else "global" for layer in range(config.n_layer)})
    places = None if exchange is None else exchange.queries(positions.shape[-1])
    parts: tuple[Part, ...] | None = None
    if places is not None:
        parts = tuple(part_at(config, kinds, positions, documents_BT, queries) for queries in places)
    elif documents_BT is not None:
        parts = parts_of(config, kinds, positions, documents_BT)
    everything = torch.arange(cached + positions.shape[-1], device=positions.device) if cached else positions
    queries = range(cached, everything.shape[-1])
    own = (lambda whole, dim: whole) if exchange is None else exchange.own
    factor = temperatures(config, positions)
    shared = Shared(
        angles={which: own_angles(angles(config, positions, which=which), own) for which in sorted(ropes)},
        masks={} if parts else {kind: mask_of(config, kind, everything, documents_BT, queries) for kind in kinds},
        causal=cached == 0,
        temperature=None if factor is None else own(factor, -2),
        parts=parts,
        exchange=exchange,
    )
    if exchange is not None:
        exchange.check(shared)
    return shared


def own_angles(pair: tuple[Tensor, Tensor], own: Callable[[Tensor, int], Tensor]) -> tuple[Tensor, Tensor]:
    """Cosine and sine of this process's tokens."""
    return own(pair[0], -2), own(pair[1], -2)


def part_at(
    config: Config, kinds: Sequence[str], positions: Tensor, documents_BT: Tensor | None, queries: range
) -> Part:
    """Queries at these places of a row, which see keys up to the last of them."""
    masks = {kind: mask_of(config, kind, positions, documents_BT, queries) for kind in kinds}
    return Part(len(queries), masks, keys=queries.stop)


def parts_of(config: Config, kinds: Sequence[str], positions: Tensor, documents_BT: Tensor) -> tuple[Part, ...] | None:
    """The documents in a row, each with its masks; None if there are several rows, or a document is in pieces.

    Attention to one after the other costs the sum of their squared lengths, not the square of the sum. On accelerators
    the lengths would have to be waited for, and small kernels would follow one another, so there it is None too.
    """
    if len(documents_BT) > 1 or documents_BT.device.type != "cpu" or torch.compiler.is_compiling():
        return None
    numbers, lengths = documents_BT[0].unique_consecutive(return_counts=True)
    if len(numbers.unique()) < len(numbers):
        return None
    sizes = lengths.tolist()
    return tuple(
        Part(size, {kind: mask_of(config, kind, places, None, range(size)) for kind in kinds})
        for size, places in zip(sizes, positions.split(sizes, dim=-1), strict=True)
    )


def mask_of(config: Config, kind: str, positions: Tensor, documents_BT: Tensor | None, queries: range) -> Mask | None:
    """(B or 1, 1, T, U), True where the query's token may see the key's; None where torch needs no mask to know.

    On an accelerator, where there are several queries, the blocks of such a mask.

    Args:
        positions: of all tokens, (U,) or (B, U) and maybe more that are not looked at.
        queries: the places of the T queries; keys are those up to the last of them, U.
    """
    window = config.sliding_window_size if kind == "local" else None
    bounded = window is not None and queries.stop > window
    if documents_BT is None and not bounded and (queries.start == 0 or len(queries) == 1):
        return None
    if positions.device.type == "cuda" and len(queries) > 1:
        return blocks_of(config, positions, documents_BT, queries, window=window if bounded else None)
    return dense_mask(config, positions, documents_BT, queries, window=window if bounded else None)


def dense_mask(
    config: Config, positions: Tensor, documents_BT: Tensor | None, queries: range, *, window: int | None
) -> Tensor:
    """(B or 1, 1, T, U), True where the query's token may see the key's, for layers of this window if there is one."""
    place = torch.arange(queries.stop, device=positions.device)
    behind = place[queries.start :, None] - place[None, :]
    seen = (behind >= 0)[None, None]
    if window is not None:
        if config.window_type == "sliding":
            seen = seen & (behind < window)
        else:  # equal chunks of positions, which restart with every document
            chunk = positions[..., : queries.stop] // window
            seen = seen & (chunk[..., queries.start :, None] == chunk[..., None, :]).unsqueeze(-3)
    if documents_BT is not None:
        document = documents_BT[:, None, : queries.stop]
        seen = seen & (document[..., queries.start :, None] == document[..., None, :])
    return seen


def temperatures(config: Config, positions: Tensor) -> Tensor | None:
    """1 + scale ln(1 + floor(position / floor_scale)), a factor on queries (Nakanishi 2025; Llama 4)."""
    settings = config.query_temperature
    if settings is None:
        return None
    steps = torch.floor((positions.float() + settings["first_position"]) / settings["floor_scale"])
    factor = 1 + settings["scale"] * torch.log1p(steps)
    return factor[..., None, :, None] if factor.dim() > 1 else factor[None, None, :, None]


class Attention(nn.Module):
    """Self-attention over (B, T, D); its number of heads is read off its tensors, so that a part of it runs alone."""

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        assert config.head_size is not None and config.n_query_groups is not None
        self.head_size = config.head_size
        self.scale = (config.attention_scores_scalar or config.head_size) ** -0.5
        self.softcap = config.attention_logit_softcapping
        self.window = "local" if config.is_local(layer) else "global"
        self.rope = config.rope_of(layer)
        self.interleave = config.rope_interleave
        self.tempered = config.query_temperature is not None and (config.rope_layers is None or self.rope is None)
        bias = config.bias or config.attn_bias
        out_bias = config.bias if config.attn_out_bias is None else config.attn_out_bias
        self.q = nn.Linear(config.n_embd, config.n_head * config.head_size, bias=bias)
        self.k = nn.Linear(config.n_embd, config.n_query_groups * config.head_size, bias=bias)
        self.v = nn.Linear(config.n_embd, config.n_query_groups * config.head_size, bias=bias)
        self.out = nn.Linear(config.n_head * config.head_size, config.n_embd, bias=out_bias)
        self.sinks = nn.Parameter(torch.zeros(config.n_head)) if config.attention_sinks else None
        self.norm_kind = config.norm_qk_type if config.norm_qk else None
        self.norm_q = qk_norm(config, config.n_head, self.norm_kind)
        self.norm_k = qk_norm(config, config.n_query_groups, self.norm_kind)
        self.eps = config.norm_eps

    def forward(self, x_BTD: Tensor, shared: Shared, cache: LayerCache | None = None) -> Tensor:
        """Attend to the tokens that `shared` lets each see, those in the cache included."""
        q, k, v = self.q(x_BTD), self.k(x_BTD), self.v(x_BTD)
        if self.norm_kind == "olmo2":
            q, k = self.norm_q(q), self.norm_k(k)
        q, k, v = (part.unflatten(-1, (-1, self.head_size)) for part in (q, k, v))
        if self.norm_kind in ("default", "per_head"):
            q, k = self.norm_q(q), self.norm_k(k)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        q, k = self._place(q, k, shared)
        if self.tempered and shared.temperature is not None:
            q = (q * shared.temperature).to(q.dtype)
        if cache is not None:
            k, v = cache.append(k, v)
        return self.out(self.attended(q, k, v, shared, self.sinks).transpose(1, 2).flatten(2))

    def attended(self, q_BHTS: Tensor, k_BKUS: Tensor, v_BKUS: Tensor, shared: Shared, sinks: Tensor | None) -> Tensor:
        """(B, H, T, S), what each query finds."""
        return attend_as(
            shared,
            q_BHTS,
            k_BKUS,
            v_BKUS,
            window=self.window,
            scale=self.scale,
            softcap=self.softcap,
            sinks=sinks,
        )

    def _place(self, q: Tensor, k: Tensor, shared: Shared) -> tuple[Tensor, Tensor]:
        """Tell queries and keys their positions, with the norms of those shapes that norm them afterwards."""
        if self.rope is not None:
            cos, sin = shared.angles[self.rope]
            q, k = (rotate(part, cos, sin, interleave=self.interleave) for part in (q, k))
            if self.norm_kind == "l2_after_rope":
                q, k = (F.rms_norm(part.float(), part.shape[-1:], eps=self.eps).to(part.dtype) for part in (q, k))
        return (self.norm_q(q), self.norm_k(k)) if self.norm_kind == "after_rope" else (q, k)


def qk_norm(config: Config, heads: int, kind: str | None) -> nn.Module:
    """The norm of queries or keys: over each head, over all heads together, or with a weight for each head."""
    assert config.head_size is not None
    if kind in ("default", "after_rope"):
        return norm(config, config.head_size)
    if kind == "olmo2":
        return norm(config, heads * config.head_size)
    if kind == "per_head":
        return scale_norm(config, (heads, config.head_size))
    return nn.Identity()


def attend_as(
    shared: Shared,
    q_BHTS: Tensor,
    k_BKUS: Tensor,
    v_BKUS: Tensor,
    *,
    window: str,
    sinks: Tensor | None = None,
    **settings: Any,
) -> Tensor:
    """What each query finds in the layers of this kind of window, (B, H, T, S of the values); settings of `attend`."""
    find: partial[Tensor] = partial(attend_in_parts, shared, window=window, **settings)
    if shared.exchange is None:
        return find(q_BHTS, k_BKUS, v_BKUS, sinks=sinks)
    return shared.exchange(find, q_BHTS, k_BKUS, v_BKUS, sinks)


def attend_in_parts(
    shared: Shared, q_BHTS: Tensor, k_BKUS: Tensor, v_BKUS: Tensor, *, window: str, **settings: Any
) -> Tensor:
    """What each query finds among keys that are all here, (B, H, T, S of the values)."""
    if shared.parts is None:
        return attend(q_BHTS, k_BKUS, v_BKUS, mask=shared.masks[window], causal=shared.causal, **settings)
    pieces = (q_BHTS.split([part.tokens for part in shared.parts], dim=2), seen(shared.parts, k_BKUS))
    return torch.cat(
        [
            attend(q, k, v, mask=part.masks[window], causal=q.shape[2] == k.shape[2], **settings)
            for part, q, k, v in zip(shared.parts, *pieces, seen(shared.parts, v_BKUS), strict=True)
        ],
        dim=2,
    )


def seen(parts: Sequence[Part], whole_BKUS: Tensor) -> Sequence[Tensor]:
    """The keys or values for the queries of each part."""
    if all(part.keys is None for part in parts):
        return whole_BKUS.split([part.tokens for part in parts], dim=2)
    return [whole_BKUS[:, :, : part.keys] for part in parts]


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
    """Softmax attention, (B, H, T, S of the values); query head h reads key-value head h K / H.

    Args:
        mask: True where a query may see a key, or blocks of such; None: no later one if `causal`, else all.
        softcap: scores go through softcap tanh(score / softcap) (Gemma 2).
        sinks: (H,), a score of each head for seeing nothing (gpt-oss).
    """
    if isinstance(mask, BlockMask):
        return attend_in_blocks(q_BHTS, k_BKUS, v_BKUS, blocks=mask, scale=scale, softcap=softcap, sinks=sinks)
    grouped = q_BHTS.shape[1] != k_BKUS.shape[1]
    if softcap is None and sinks is None:
        if mask is None and causal and is_narrow(q_BHTS, k_BKUS, v_BKUS):
            return narrow_attention(q_BHTS, k_BKUS, v_BKUS, scale)
        return F.scaled_dot_product_attention(
            q_BHTS, k_BKUS, v_BKUS, mask, is_causal=mask is None and causal, scale=scale, enable_gqa=grouped
        )
    q_BKGTS = q_BHTS.unflatten(1, (k_BKUS.shape[1], -1))
    scores = (q_BKGTS @ k_BKUS.unsqueeze(2).mT).flatten(1, 2) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is None and causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    exact = torch.promote_types(scores.dtype, torch.float32)
    if sinks is not None:
        column = sinks.to(scores.dtype)[None, :, None, None].expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, column], dim=-1)
    shares = torch.softmax(scores, dim=-1, dtype=exact).to(v_BKUS.dtype)
    shares = shares if sinks is None else shares[..., :-1]
    return (shares.unflatten(1, (k_BKUS.shape[1], -1)) @ v_BKUS.unsqueeze(2)).flatten(1, 2)
