"""The inputs that all layers of a forward pass share: rotary angles, masks and segments of attention, and routing.

Axes: B batch, H heads, K key-value heads, T tokens (query), U tokens (key), S numbers of a head.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from litgpt.model.config import Config
from litgpt.model.flex_attention import BlockMask, build_block_mask, join_masks
from litgpt.model.rotary import build_angles
from litgpt.model.routing import Routing

Mask = Tensor | BlockMask


class Exchange(Protocol):
    """A wrapper around core attention, which completes keys and values that are only partly available."""

    def __call__(
        self, attend: partial[Tensor], q_BHTS: Tensor, k_BKTS: Tensor, v_BKTS: Tensor, sinks: Tensor | None, /
    ) -> Tensor:
        """Attention output (B, H, T, S), by calls of `attend(q, k, v, sinks=)`.

        The `scale` that queries are multiplied by is among the keywords of `attend`.
        """


@dataclass(frozen=True)
class Segment:
    """Consecutive queries that attend separately from the others, e.g. those of one document.

    Attributes:
        tokens: number of queries; they follow those of the segment before.
        masks: as in `AttentionInputs`.
        keys: number of keys, counted from the start of the row; None for the keys of the same tokens.
        texts: the number of texts that the queries belong to, the same number each, one text after the other; with a
            cache that has keys (texts, K, U, S) for them.
    """

    tokens: int
    masks: Mapping[str, Mask | None]
    keys: int | None = None
    texts: int = 1


@dataclass(frozen=True)
class AttentionInputs:
    """Inputs that all blocks of one forward pass share.

    Attributes:
        positions: of the tokens, (T,) or (B, T).
        documents_BT: the document of each token; None if each row is one document.
        angles: cosine and sine for `global` and, if the model has a second rotary embedding, `local`.
        masks: for `global` and `local` layers, (B or 1, 1, T, U), True where the query may attend to the key, or its
            block mask on an accelerator; None for attention as `causal` says.
        causal: without a mask, whether a query attends to no later key, or (one query, cached keys) to every key.
        temperature: a factor on queries by position, (1 or B, 1, T, 1), or None.
        segments: queries that attend one segment after the other; None if all attend at once, by `masks`.
        exchange: a wrapper around core attention, or None.
        routing: how routers work in training; None for inference.
    """

    positions: Tensor
    documents_BT: Tensor | None
    angles: Mapping[str, tuple[Tensor, Tensor]]
    masks: Mapping[str, Mask | None]
    causal: bool = True
    temperature: Tensor | None = None
    segments: tuple[Segment, ...] | None = None
    exchange: Exchange | None = None
    routing: Routing | None = None


def build_attention_inputs(
    config: Config,
    positions: Tensor,
    documents_BT: Tensor | None = None,
    *,
    blocks_BT: Tensor | None = None,
    cached: int = 0,
    queries: Sequence[range] | None = None,
) -> AttentionInputs:
    """Build angles and masks for every kind of layer of the model.

    Args:
        positions: of whole rows, (T,) if all rows have the same, else (B, T), or (B, 3, T) by `rope_sections`.
        documents_BT: the document of each token; attention stays within a document.
        blocks_BT: as of `find_blocks`; None for attention to earlier tokens only.
        cached: number of tokens before these.
        queries: the indices in a row of the queries that attend, one segment each; None for all.
    """
    ropes, kinds = list_ropes(config), list_attention_kinds(config)
    angles = {rope: build_angles(config, positions, rope=rope) for rope in ropes}
    if positions.dim() == 3:  # masks go by the order of tokens, which rows and columns of images do not
        positions = torch.arange(positions.shape[-1], device=positions.device)
    segments: tuple[Segment, ...] | None = None
    if queries is not None:
        segments = tuple(
            build_chunk_segment(config, kinds, positions, documents_BT, chunk, blocks_BT) for chunk in queries
        )
    elif documents_BT is not None:
        segments = split_documents(config, kinds, positions, documents_BT, blocks_BT)
    keys = torch.arange(cached + positions.shape[-1], device=positions.device) if cached else positions
    indices = range(cached, keys.shape[-1])
    return AttentionInputs(
        positions=positions,
        documents_BT=documents_BT,
        angles=angles,
        masks={}
        if segments
        else build_masks(config, kinds, keys, documents_BT, indices, blocks_BT=blocks_BT, dense=cached > 0),
        causal=cached == 0,
        temperature=compute_temperature(config, positions),
        segments=segments,
    )


def list_ropes(config: Config) -> list[str]:
    """The rotary embeddings of the layers."""
    return sorted({rope for rope in map(config.rope_of, range(config.n_layer)) if rope})


def list_attention_kinds(config: Config) -> list[str]:
    """The kinds of the layers' attention: `global`, `local` or both."""
    return sorted({"local" if config.is_local(layer) else "global" for layer in range(config.n_layer)})


def split_documents(
    config: Config, kinds: Sequence[str], positions: Tensor, documents_BT: Tensor, blocks_BT: Tensor | None
) -> tuple[Segment, ...] | None:
    """One segment for each document in a row; None for several rows, or if a document is not contiguous.

    Attention to one document after the other costs the sum of their squared lengths, not the square of the sum. On
    accelerators this would synchronize for the lengths and launch many small kernels, so the result is None there too.
    """
    if len(documents_BT) > 1 or documents_BT.device.type != "cpu" or torch.compiler.is_compiling():
        return None
    numbers, lengths = documents_BT[0].unique_consecutive(return_counts=True)
    if len(numbers.unique()) < len(numbers):
        return None
    sizes = lengths.tolist()
    blocks = [None] * len(sizes) if blocks_BT is None else blocks_BT.split(sizes, dim=-1)
    return tuple(
        Segment(size, build_masks(config, kinds, document_positions, None, range(size), blocks_BT=document_blocks))
        for size, document_positions, document_blocks in zip(sizes, positions.split(sizes, dim=-1), blocks, strict=True)
    )


def build_chunk_segment(
    config: Config,
    kinds: Sequence[str],
    positions: Tensor,
    documents_BT: Tensor | None,
    chunk: range,
    blocks_BT: Tensor | None,
) -> Segment:
    """The queries of a chunk of rows; the keys are those up to the last of them, or all if blocks have later ones."""
    keys = chunk.stop if blocks_BT is None else positions.shape[-1]
    masks = build_masks(config, kinds, positions, documents_BT, chunk, blocks_BT=blocks_BT, keys=keys)
    return Segment(len(chunk), masks, keys=keys)


def build_masks(
    config: Config,
    kinds: Sequence[str],
    positions: Tensor,
    documents_BT: Tensor | None,
    queries: range,
    *,
    blocks_BT: Tensor | None = None,
    keys: int | None = None,
    dense: bool = False,
) -> dict[str, Mask | None]:
    """Masks (B or 1, 1, T, U), True where the query may attend to the key; None where `is_causal` is enough.

    For several queries on an accelerator these are block masks, unless `dense`, as for the few queries after a cache.

    Args:
        kinds: `global`, `local` or both.
        positions: of all tokens, (U,) or (B, U); later ones are ignored.
        queries: the indices in the row of the T queries.
        keys: the number of keys, U; None for those up to the last query.
    """
    is_blocked = positions.device.type == "cuda" and len(queries) > 1 and not dense
    build = build_block_mask if is_blocked else build_dense_mask
    masks: dict[str, Mask | None] = {}
    for kind in kinds:
        window = config.sliding_window_size if kind == "local" else None
        window = None if window is None or queries.stop <= window else window
        is_plain = documents_BT is None and blocks_BT is None and window is None
        is_causal = is_plain and (queries.start == 0 or len(queries) == 1)
        settings: dict[str, Any] = {"window": window, "blocks_BT": blocks_BT, "keys": keys or queries.stop}
        masks[kind] = None if is_causal else build(config, positions, documents_BT, queries, **settings)
    return masks


def build_dense_mask(
    config: Config,
    positions: Tensor,
    documents_BT: Tensor | None,
    queries: range,
    *,
    keys: int,
    window: int | None,
    blocks_BT: Tensor | None = None,
) -> Tensor:
    """The mask of `build_masks` as a boolean tensor, for layers with this window, or None for no window."""
    rows = slice(queries.start, queries.stop)
    indices = torch.arange(keys, device=positions.device)
    distances = indices[rows, None] - indices[None, :]
    same_block = in_window = None
    if blocks_BT is not None:
        blocks = blocks_BT[:, None, :keys]
        same_block = is_same_block(blocks[..., rows], blocks)
    if window is not None:
        ends = positions[..., :keys]
        in_window = is_in_window(config, window, distances, ends[..., rows], ends).unsqueeze(-3)
    allowed = join_masks(config, (distances >= 0)[None, None], same_block, in_window)
    if documents_BT is not None:
        documents = documents_BT[:, None, :keys]
        allowed = allowed & (documents[..., rows, None] == documents[..., None, :])
    return allowed


def find_blocks(config: Config, ids_BT: Tensor, prompts_BT: Tensor | None = None) -> Tensor | None:
    """The number of the block of each token, (B, T), whose tokens attend to each other; -1 for those of no block.

    Blocks are the images of a row, which have text between, or the prompt of each document. None if no token is in
    one.

    Args:
        prompts_BT: whether a token is of a prompt; None if none is.
    """
    if config.has_prompt_blocks:
        return None if prompts_BT is None else prompts_BT.int() - 1
    if config.vision is None or not config.vision["image_blocks"]:
        return None
    is_place = ids_BT == config.vision["image_token"]
    if not is_place.any():
        return None
    begins = is_place & ~F.pad(is_place, (1, 0))[:, :-1]
    return torch.where(is_place, begins.cumsum(1), -1)


def is_same_block(q_blocks: Tensor, k_blocks: Tensor) -> Tensor:
    """Whether a query and a key are of one block, (..., T, U), from the numbers of blocks (..., T) and (..., U)."""
    return (q_blocks[..., :, None] == k_blocks[..., None, :]) & (q_blocks >= 0)[..., :, None]


def is_in_window(config: Config, window: int, distances: Tensor, q_positions: Tensor, k_positions: Tensor) -> Tensor:
    """Whether a key is within the window of a query, (..., T, U), from positions (..., T) and (..., U).

    Args:
        distances: the number of tokens from key to query, (..., T, U); positions restart with every document.
    """
    if config.window_type == "sliding":
        return distances < window
    return (q_positions // window)[..., :, None] == (k_positions // window)[..., None, :]  # equal chunks


def build_cached_masks(
    config: Config,
    kinds: Sequence[str],
    starts: Sequence[int],
    tokens: int,
    device: torch.device,
    *,
    kept: int | None = None,
    blocks_NT: Tensor | None = None,
) -> dict[str, Mask | None]:
    """Masks (N, 1, T, U) for texts of which the last T tokens are queries and all tokens are keys; None for no mask.

    Args:
        kinds: `global`, `local` or both.
        starts: number of tokens of each text before its queries; U is for the longest text, T is `tokens`.
        kept: the number of keys of `local` layers if a text is longer: key t is in place of key t - kept. None if they
            have all keys.
        blocks_NT: the number of the block of each query, as of `find_blocks`, whose later tokens are queries too; None
            for attention to earlier tokens only.
    """
    longest = max(starts) + tokens
    is_plain = (tokens == 1 or longest == tokens) and min(starts) == max(starts) and blocks_NT is None
    starts_N1 = torch.tensor(starts, device=device)[:, None]
    q_positions = starts_N1 + torch.arange(tokens, device=device)
    masks: dict[str, Mask | None] = {}
    for kind in kinds:
        window = config.sliding_window_size if kind == "local" else None
        k_positions = torch.arange(longest, device=device)
        if window is not None and kept is not None and longest > kept:  # the last token of each place, or below 0
            last = q_positions[:, -1:]
            k_positions = last - (last - k_positions[:kept]) % kept
        distances = q_positions[:, :, None] - k_positions[..., None, :]
        same_block = in_window = None
        if blocks_NT is not None:
            numbers_NU = k_positions - starts_N1  # among the queries
            is_query = (numbers_NU >= 0) & (numbers_NU < tokens)
            earlier = torch.where(numbers_NU < 0, 0 if config.has_prompt_blocks else -1, -1)  # a prompt begins a text
            k_blocks = torch.where(is_query, blocks_NT.gather(1, numbers_NU.clamp(0, tokens - 1)), earlier)
            same_block = is_same_block(blocks_NT, k_blocks)
        if window is not None and longest > window:
            in_window = is_in_window(config, window, distances, q_positions, k_positions)
        allowed = join_masks(config, distances >= 0, same_block, in_window) & (k_positions >= 0)[..., None, :]
        masks[kind] = None if is_plain and in_window is None else allowed[:, None]
    return masks


def compute_temperature(config: Config, positions: Tensor) -> Tensor | None:
    """1 + scale ln(1 + floor(position / floor_scale)), a factor on queries (Nakanishi 2025; Llama 4)."""
    settings = config.query_temperature
    if settings is None:
        return None
    steps = torch.floor((positions.float() + settings["first_position"]) / settings["floor_scale"])
    factor = 1 + settings["scale"] * torch.log1p(steps)
    return factor[..., None, :, None] if factor.dim() > 1 else factor[None, None, :, None]
