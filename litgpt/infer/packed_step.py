"""One forward pass over the next tokens of many texts, packed in one row, with their keys and values in blocks.

Axes: B batch (1), K key-value heads, T tokens, N texts of a group, U tokens of a text, S head size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from litgpt.infer.block_cache import CacheBlock, Slab
from litgpt.infer.onednn import ReorderedMatrix, is_half_row, multiply_row
from litgpt.infer.prompt_images import PlacedFeatures
from litgpt.model.attention import KVCacheLayer
from litgpt.model.attention_inputs import (
    AttentionInputs,
    Segment,
    build_cached_masks,
    compute_temperature,
    list_attention_kinds,
    list_ropes,
)
from litgpt.model.config import Config
from litgpt.model.gpt import GPT, cap_logits, compute_logits
from litgpt.model.media import number_places
from litgpt.model.rotary import LENGTH_KINDS, build_angles

MAX_SHARED_TOKENS = 16
"""Texts with more new tokens each are groups of their own, because a common mask would be large."""


@dataclass(frozen=True)
class Chunk:
    """The next tokens of one text.

    Attributes:
        logits: how many of its last tokens need logits.
        keys: what identifies their keys and values in the cache; None for the tokens themselves.
        positions: of time, row and column, (3, T); None if all three are the number of the token.
        features: those of images among the tokens.
        blocks: the number of the block of each token, -1 for those of none, whose tokens attend to each other; None if
            no token is in one.
    """

    block: CacheBlock
    ids: Sequence[int]
    logits: int = 1
    keys: Sequence[int] | None = None
    positions: Tensor | None = None
    features: PlacedFeatures | None = None
    blocks: Sequence[int] | None = None

    @property
    def start(self) -> int:
        """The number of tokens before these."""
        return len(self.block.ids)


@dataclass(frozen=True)
class ChunkGroup:
    """Chunks of the same number of tokens in neighbouring blocks."""

    chunks: tuple[Chunk, ...]

    @property
    def tokens(self) -> int:
        """The number of tokens of each chunk."""
        return len(self.chunks[0].ids)

    @property
    def slab(self) -> Slab:
        """The memory of all blocks."""
        return self.chunks[0].block.slab

    def list_blocks(self, device: torch.device) -> Tensor | None:
        """The `blocks` of the chunks, (N, T); None if no chunk has any."""
        if all(chunk.blocks is None for chunk in self.chunks):
            return None
        return torch.tensor([chunk.blocks or [-1] * self.tokens for chunk in self.chunks], device=device)

    def can_append(self, chunk: Chunk) -> bool:
        """Whether the chunk's block is the next one, and it has the same number of tokens."""
        last = self.chunks[-1].block
        is_next = chunk.block.slab is last.slab and chunk.block.index == last.index + 1
        return is_next and len(chunk.ids) == self.tokens <= MAX_SHARED_TOKENS


def group_chunks(chunks: Sequence[Chunk], slabs: Sequence[Slab]) -> list[ChunkGroup]:
    """The chunks in an order in which as many as possible are neighbours."""
    numbers = {id(slab): number for number, slab in enumerate(slabs)}
    groups: list[ChunkGroup] = []
    for chunk in sorted(chunks, key=lambda c: (len(c.ids), numbers[id(c.block.slab)], c.block.index)):
        if groups and groups[-1].can_append(chunk):
            groups[-1] = ChunkGroup((*groups[-1].chunks, chunk))
        else:
            groups.append(ChunkGroup((chunk,)))
    return groups


class GroupWriter:
    """Writes the keys and values of one group, and returns those of its texts."""

    def __init__(self, group: ChunkGroup, device: torch.device) -> None:
        self.slab, self.tokens, self.texts = group.slab, group.tokens, len(group.chunks)
        self.first = group.chunks[0].block.index
        self.starts = [chunk.start for chunk in group.chunks]
        self.end = max(self.starts) + group.tokens
        windows = group.slab.windows
        assert windows is None or group.tokens <= windows.kept - windows.window
        positions = torch.tensor(self.starts, device=device)[:, None] + torch.arange(group.tokens, device=device)
        self.blocks_NT = torch.arange(self.texts, device=device)[:, None].expand_as(positions)
        self.positions_NT = positions

    def write(self, layer: int, k_BKTS: Tensor, v_BKTS: Tensor) -> tuple[Tensor, Tensor]:
        """Write new keys and values (1, K, N T, S); all of them that are in memory, (N, K, U, S)."""
        buffers = self.slab.get_layer(layer, k_BKTS, v_BKTS)
        k, v = (self._write(x, buffer) for x, buffer in zip((k_BKTS, v_BKTS), buffers, strict=True))
        return k, v

    def _write(self, x_BKTS: Tensor, buffer_NKUS: Tensor) -> Tensor:
        kept = buffer_NKUS.shape[2]
        blocks = buffer_NKUS.narrow(0, self.first, self.texts)
        if self.texts == 1 and self.end <= kept:
            blocks.narrow(2, self.starts[0], self.tokens).copy_(x_BKTS)
        else:  # (N, T, K, S), because the indexed axes come first
            positions = self.positions_NT if self.end <= kept else self.positions_NT % kept
            blocks[self.blocks_NT, :, positions] = x_BKTS[0].unflatten(1, (self.texts, -1)).permute(1, 2, 0, 3)
        return blocks if self.end >= kept else blocks.narrow(2, 0, self.end)


class PackedLayer(KVCacheLayer):
    """The keys and values of one layer for all texts of a forward pass."""

    def __init__(self, writers: Sequence[GroupWriter], layer: int) -> None:
        self.writers, self.layer = writers, layer
        self.sizes = [writer.texts * writer.tokens for writer in writers]

    def append(self, k_BKTS: Tensor, v_BKTS: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Append those of the new tokens, and return those of each group, (N, K, U, S)."""
        if len(self.writers) == 1:
            k, v = self.writers[0].write(self.layer, k_BKTS, v_BKTS)
            return [k], [v]
        news = zip(self.writers, k_BKTS.split(self.sizes, 2), v_BKTS.split(self.sizes, 2), strict=True)
        written = [writer.write(self.layer, k, v) for writer, k, v in news]
        return [k for k, _ in written], [v for _, v in written]


class PackedCache:
    """The keys and values of all layers for all texts of a forward pass."""

    length = 0

    def __init__(self, groups: Sequence[ChunkGroup], layers: int, device: torch.device) -> None:
        writers = [GroupWriter(group, device) for group in groups]
        self.layers = [PackedLayer(writers, layer) for layer in range(layers)]

    def advance(self, tokens: int) -> None:
        """Nothing to count: each block has the tokens that it holds."""


def build_packed_inputs(config: Config, groups: Sequence[ChunkGroup], device: torch.device) -> AttentionInputs:
    """Angles of all tokens, and one segment of queries for each group."""
    kinds = list_attention_kinds(config)
    chunks = [chunk for group in groups for chunk in group.chunks]
    ranges = [range(chunk.start, chunk.start + len(chunk.ids)) for chunk in chunks]
    positions = torch.tensor([position for span in ranges for position in span], device=device)
    rotated = arrange_positions(chunks, positions)
    pieces = rotated.split([len(span) for span in ranges], -1) if config.rope_kind in LENGTH_KINDS else [rotated]
    angles = {}
    for rope in list_ropes(config):
        cos, sin = zip(*(build_angles(config, piece, rope=rope) for piece in pieces), strict=True)
        angles[rope] = torch.cat(cos, -2), torch.cat(sin, -2)
    return AttentionInputs(
        positions=positions,
        documents_BT=None,
        angles=angles,
        masks={},
        temperature=compute_temperature(config, positions),
        segments=tuple(
            Segment(
                group.tokens * len(group.chunks),
                build_cached_masks(
                    config,
                    kinds,
                    [chunk.start for chunk in group.chunks],
                    group.tokens,
                    device,
                    kept=group.slab.window_size,
                    blocks_NT=group.list_blocks(device),
                ),
                texts=len(group.chunks),
            )
            for group in groups
        ),
    )


def arrange_positions(chunks: Sequence[Chunk], positions: Tensor) -> Tensor:
    """The positions of angles: those given, (T,), or (1, 3, T) of time, row and column if a text has images."""
    if all(chunk.positions is None for chunk in chunks):
        return positions
    parts = positions.split([len(chunk.ids) for chunk in chunks])
    rows = [
        part.expand(3, -1) if chunk.positions is None else chunk.positions.to(positions.device)
        for chunk, part in zip(chunks, parts, strict=True)
    ]
    return torch.cat(rows, 1)[None]


def embed_images(model: GPT, ids_BT: Tensor, positions: Tensor, chunks: Sequence[Chunk]) -> Tensor | None:
    """The embeddings (1, T, D) of the tokens of chunks, with the features of their images; None without images."""
    if all(chunk.features is None for chunk in chunks):
        return None
    start, is_place, features = 0, torch.zeros(ids_BT.shape, dtype=torch.bool), list[Tensor]()
    for chunk in chunks:
        if chunk.features is not None:
            is_place[0, torch.tensor(chunk.features.places) + start] = True
            features.append(chunk.features.features_MD)
        start += len(chunk.ids)
    return model.embed_features(ids_BT, positions, number_places(is_place).to(ids_BT.device), torch.cat(features))


def compute_indexed_logits(
    head: ReorderedMatrix | None,
    indices: Tensor,
    hidden_BTD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    softcap: float | None,
) -> Tensor:
    """Logits (R, V) of these tokens of a row; by the kernels for few rows if `head` is not None."""
    x_RD = hidden_BTD[0, indices]
    if head is not None and is_half_row(x_RD, (weight_VD,)):
        return cap_logits(multiply_row(x_RD, weight_VD, bias_V), softcap)
    if head is None or not head.prepare(x_RD, (weight_VD,)):
        return compute_logits(x_RD, weight_VD, bias_V, softcap)
    return cap_logits(head.multiply(x_RD, bias_V), softcap)


def run_packed(
    model: GPT,
    chunks: Sequence[Chunk],
    slabs: Sequence[Slab],
    *,
    head: ReorderedMatrix | None = None,
    forward: Callable[..., Tensor] | None = None,
) -> list[Tensor]:
    """Process the chunks in one forward pass; for each, the logits (its number of tokens with logits, V).

    The tokens of the chunks are added to those of their blocks.

    Args:
        head: the output weight in oneDNN's layout, or None.
        forward: called with the token ids and the keywords `inputs`, `head` and `cache` instead of the model.
    """
    device = next(model.parameters()).device
    groups = group_chunks(chunks, slabs)
    ordered = [chunk for group in groups for chunk in group.chunks]
    ids = torch.tensor([[token for chunk in ordered for token in chunk.ids]], device=device)
    ends = 0
    indices: list[int] = []
    for chunk in ordered:
        ends += len(chunk.ids)
        indices += range(ends - chunk.logits, ends)
    compute = partial(compute_indexed_logits, head, torch.tensor(indices, device=device, dtype=torch.int64))
    inputs = build_packed_inputs(model.config, groups, device)
    cache = PackedCache(groups, model.config.n_layer, device)
    hidden = embed_images(model, ids, inputs.positions, ordered)
    settings = {} if hidden is None else {"hidden_BTD": hidden}
    logits = (forward or model)(ids, inputs=inputs, head=compute, cache=cache, **settings)
    by_chunk = dict(zip(map(id, ordered), logits.split([chunk.logits for chunk in ordered]), strict=True))
    for chunk in ordered:
        chunk.block.extend(chunk.ids if chunk.keys is None else chunk.keys)
    return [by_chunk[id(chunk)] for chunk in chunks]
