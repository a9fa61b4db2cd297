"""Token sharding: the tokens of a batch (context axis) and the rows of the vocabulary (tensor axis) of each rank.

Axes: B batch, T tokens of a row, P tokens of this rank, D model width, V vocabulary.
"""

from abc import ABC, abstractmethod
from dataclasses import replace
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from litgpt.model.attention_inputs import AttentionInputs, build_attention_inputs
from litgpt.model.config import Config
from litgpt.parallel.collectives import all_gather_replicated, all_reduce, all_reduce_no_grad

Attend = partial[Tensor]
"""Attention of a layer, as a function of queries, keys, values and sinks."""


class VocabularyShard:
    """The rows of the output matrix on this rank of the tensor axis.

    Attributes:
        first_row: number of the first of them.
    """

    def __init__(self, group: ProcessGroup, rows: int) -> None:
        self.group = group
        self.first_row = rows * dist.get_rank(group)

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        """The sum over all shards, without gradient."""
        return all_reduce_no_grad(values, self.group)

    def all_reduce_max(self, values: Tensor) -> Tensor:
        """The maximum over all shards, without gradient."""
        return all_reduce_no_grad(values, self.group, dist.ReduceOp.MAX)

    def gather_logits(self, logits: Tensor) -> Tensor:
        """(..., V) from the (..., rows) logits of all shards."""
        return all_gather_replicated(logits, self.group, -1)


class HeadTailSharding:
    """Assigns the tokens of a row to ranks: each row is split into two chunks per rank.

    If `head_tail`, rank r of c has the chunks r and 2 c - 1 - r: one with few keys before it and one with many, so that
    all ranks do the same amount of work (Llama Team 2024, section 3.3.2). Otherwise its chunks are consecutive.
    """

    def __init__(self, group: ProcessGroup, *, head_tail: bool) -> None:
        self.ranks, self.rank = dist.get_world_size(group), dist.get_rank(group)
        last = 2 * self.ranks - 1
        self.chunks = [(rank, last - rank) if head_tail else (2 * rank, 2 * rank + 1) for rank in range(self.ranks)]

    def local_shard(self, rows: Tensor, dim: int) -> Tensor:
        """This rank's tokens along a dim whose size is a multiple of the number of chunks."""
        if self.ranks == 1:
            return rows
        chunks = rows.chunk(2 * self.ranks, dim)
        return torch.cat([chunks[number] for number in self.chunks[self.rank]], dim)

    def restore_order(self, shards: Tensor, dim: int) -> Tensor:
        """The tokens of all ranks, given rank by rank along a dim, in the order of the row."""
        numbers = [number for pair in self.chunks for number in pair]
        if numbers == sorted(numbers):
            return shards
        chunks = shards.chunk(2 * self.ranks, dim)
        return torch.cat([chunks[numbers.index(number)] for number in range(2 * self.ranks)], dim)

    def local_ranges(self, tokens: int) -> list[range]:
        """The positions of this rank's chunks in a row of this many tokens."""
        size = tokens // (2 * self.ranks)
        return [range(number * size, (number + 1) * size) for number in self.chunks[self.rank]]


class ContextAttention(ABC):
    """Attention over rows whose tokens are sharded over the context axis; its subclasses communicate differently."""

    def __init__(self, group: ProcessGroup, sharding: HeadTailSharding) -> None:
        self.group, self.sharding = group, sharding

    def query_ranges(self, _tokens: int) -> list[range] | None:
        """The positions, in a row of this many tokens, of the queries that attend on this rank; None for all."""
        return None

    def check(self, inputs: AttentionInputs) -> None:  # noqa: B027 - most subclasses support all
        """Raise a UserError for masks and segments that are not supported; by default all are."""

    @abstractmethod
    def __call__(self, attend: Attend, q_BHPS: Tensor, k_BKPS: Tensor, v_BKPS: Tensor, sinks: Tensor | None) -> Tensor:
        """Attention output of this rank's tokens, (B, H, P, S)."""


class LocalTokens:
    """The shard of each row's tokens on this rank of the context axis; rows are padded to a multiple of the shards.

    Args:
        sharding: assigns the tokens of a row to ranks.
        attention: attention over sharded rows; None if every rank has whole rows.
        multiple: rows are padded to a multiple of this many tokens.
        vocabulary: the rows of the output matrix on this rank; None if it has all.
    """

    def __init__(
        self,
        group: ProcessGroup,
        sharding: HeadTailSharding,
        attention: ContextAttention | None,
        *,
        multiple: int,
        vocabulary: VocabularyShard | None,
    ) -> None:
        self.group, self.sharding, self.attention = group, sharding, attention
        self.multiple, self.vocabulary = multiple, vocabulary

    def pad(self, rows_BT: Tensor, value: float) -> Tensor:
        """Pad rows at the right so that they divide into shards."""
        return F.pad(rows_BT, (0, -rows_BT.shape[-1] % self.multiple), value=value)

    def local_shard(self, rows_BT: Tensor, padding: float) -> Tensor:
        """(B, P), this rank's tokens of padded rows."""
        return self.sharding.local_shard(self.pad(rows_BT, padding), -1)

    @property
    def is_first(self) -> bool:
        """Whether this rank is the first of those that share the tokens of a row."""
        return self.sharding.rank == 0

    def sum_over_shards(self, values: Tensor) -> Tensor:
        """The sum of a tensor over the ranks that share the tokens of a row, which then compute the same with it."""
        return values if self.sharding.ranks == 1 else all_reduce(values, self.group)

    def build_attention_inputs(
        self,
        config: Config,
        positions: Tensor,
        documents_BT: Tensor | None,
        *,
        blocks_BT: Tensor | None = None,
        cached: int = 0,
    ) -> AttentionInputs:
        """The attention inputs of this rank's tokens.

        Args:
            positions, documents_BT, blocks_BT: of whole rows, as in `attention_inputs.build_attention_inputs`.
            cached: number of tokens before these, whose keys and values are in a cache; 0 if rows are sharded.

        Raises:
            UserError: if the attention does not support the masks that these need.
        """
        positions = self.pad(positions, 0)
        blocks_BT = None if blocks_BT is None else self.pad(blocks_BT, -1)
        documents_BT = None if documents_BT is None else self.pad(documents_BT, -1)
        queries = None if self.attention is None else self.attention.query_ranges(positions.shape[-1])
        rows = build_attention_inputs(
            config, positions, documents_BT, blocks_BT=blocks_BT, cached=cached, queries=queries
        )
        if self.attention is None:
            return rows
        self.attention.check(rows)
        shard = self.sharding.local_shard
        return replace(
            rows,
            positions=shard(rows.positions, -1),
            documents_BT=None if documents_BT is None else shard(documents_BT, -1),
            angles={rope: (shard(cos, -2), shard(sin, -2)) for rope, (cos, sin) in rows.angles.items()},
            temperature=None if rows.temperature is None else shard(rows.temperature, -2),
            exchange=self.attention,
        )

    def gather(self, local_BPD: Tensor) -> Tensor:
        """(B, T, D) in the order of rows, padding included, from the tokens of all ranks."""
        if self.sharding.ranks == 1:
            return local_BPD
        return self.sharding.restore_order(all_gather_replicated(local_BPD, self.group, 1), 1)
