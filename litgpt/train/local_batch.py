"""The shard of a micro-batch that one rank computes, with its attention inputs."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from litgpt.data.stream.batch import IGNORE, Batch
from litgpt.model.attention_inputs import AttentionInputs, build_attention_inputs, find_blocks
from litgpt.model.config import Config
from litgpt.model.media import Media, find_sources
from litgpt.parallel.token_sharding import LocalTokens, VocabularyShard

ROW_PADDING = {"ids": 0, "labels": IGNORE, "weights": 0.0, "channels": 0, "answers": -1}
"""The rows of a `Batch` that are sharded, and their values at padding."""


@dataclass(frozen=True)
class LocalBatch:
    """This rank's shard of a `Batch`.

    Attributes:
        ids: (B, P) token ids.
        labels: (B, P), as in `Batch`; likewise `weights`, `channels` and `answers`.
        inputs: attention inputs of these tokens.
        answer_values: as in `Batch`, of all answers of the micro-batch.
        token_values: as in `Batch`, (B, P).
        later_tokens: as in `Batch`, (K, B, P).
        media: as in `Batch`, all of them on each of the ranks that share the tokens of a row.
        tokens: the sharding of tokens over ranks; None if this rank computes all tokens.
    """

    ids: Tensor
    labels: Tensor
    inputs: AttentionInputs
    weights: Tensor | None = None
    channels: Tensor | None = None
    answers: Tensor | None = None
    answer_values: dict[str, Tensor] | None = None
    token_values: dict[str, Tensor] | None = None
    later_tokens: dict[str, Tensor] | None = None
    media: Media | None = None
    tokens: LocalTokens | None = None

    @property
    def vocabulary(self) -> VocabularyShard | None:
        """The rows of the output matrix on this rank; None if it has all."""
        return None if self.tokens is None else self.tokens.vocabulary

    def sum_over_shards(self, values: Tensor) -> Tensor:
        """The sum of a tensor over the ranks that share the tokens of a row, which then compute the same with it."""
        return values if self.tokens is None else self.tokens.sum_over_shards(values)

    def report_once(self, sums: Tensor) -> Tensor:
        """A tensor that is equal on all ranks that share the tokens of a row, as terms of its sum over them: zero on
        all but the first. Gradients do not change."""
        return sums if self.tokens is None or self.tokens.is_first else sums - sums.detach()


def build_local_batch(batch: Batch, config: Config, tokens: LocalTokens | None, *, cached: int = 0) -> LocalBatch:
    """Take this rank's tokens out of a micro-batch, which is on the rank's device.

    Args:
        tokens: the sharding of tokens over ranks; None if this rank computes all tokens.
        cached: number of tokens before these, whose keys and values are in a cache.
    """
    positions = batch.positions
    if positions is None:
        positions = torch.arange(cached, cached + batch.ids.shape[1], device=batch.ids.device)
    build_inputs = build_attention_inputs if tokens is None else tokens.build_attention_inputs
    rows = take_rows({name: getattr(batch, name) for name in ROW_PADDING}, tokens)
    later = None if batch.later_tokens is None else take_rows(batch.later_tokens, tokens)
    values = None if batch.token_values is None else take_rows(batch.token_values, tokens)
    prompts = find_prompts(batch) if config.has_prompt_blocks else None
    blocks = None if cached else find_blocks(config, batch.ids, prompts)
    inputs = build_inputs(config, positions, batch.documents, blocks_BT=blocks, cached=cached)
    others: dict[str, Any] = {"answer_values": batch.answer_values, "token_values": values, "later_tokens": later}
    others["media"] = batch.media if tokens is None else take_places(batch, config, tokens)
    return LocalBatch(**rows, inputs=inputs, tokens=tokens, **others)


def find_prompts(batch: Batch) -> Tensor:
    """Whether a token of a micro-batch is before the first target of its document, (B, T), and so of a prompt."""
    is_target = (batch.labels != IGNORE).long()
    before = is_target.cumsum(1) - is_target  # the label of a token is the next one
    if batch.documents is None:
        return before == 0
    begins = F.pad(batch.documents[:, 1:] != batch.documents[:, :-1], (1, 0), value=True)
    before_document = torch.where(begins, before, 0).cummax(1).values
    return before == before_document


def take_places(batch: Batch, config: Config, tokens: LocalTokens) -> Media | None:
    """The media of a micro-batch with the places that this rank has; None without any.

    Raises:
        UserError: if the texts do not have a place for each feature.
    """
    if batch.media is None or batch.media.is_empty:
        return batch.media
    sources = find_sources(batch.ids, batch.media, config)
    return replace(batch.media, sources_BT=tokens.local_shard(sources, -1))


def take_rows(rows: Mapping[str, Any], tokens: LocalTokens | None) -> dict[str, Any]:
    """This rank's tokens of rows (..., T) by name, padded as in `ROW_PADDING`, or by 0; None stays None."""
    if tokens is None:
        return dict(rows)
    shard = tokens.local_shard
    return {name: None if row is None else shard(row, ROW_PADDING.get(name, 0.0)) for name, row in rows.items()}
