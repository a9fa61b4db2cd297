"""The shard of a micro-batch that one rank computes, with its attention inputs."""

from dataclasses import dataclass

import torch
from torch import Tensor

from litgpt.data.stream.batch import IGNORE, Batch
from litgpt.model.attention_inputs import AttentionInputs, build_attention_inputs
from litgpt.model.config import Config
from litgpt.parallel.token_sharding import LocalTokens, VocabularyShard


@dataclass(frozen=True)
class LocalBatch:
    """This rank's shard of a `Batch`.

    Attributes:
        ids: (B, P) token ids.
        labels: (B, P), as in `Batch`; likewise `weights` and `channels`.
        inputs: attention inputs of these tokens.
        vocabulary: the rows of the output matrix on this rank; None if it has all.
    """

    ids: Tensor
    labels: Tensor
    inputs: AttentionInputs
    weights: Tensor | None = None
    channels: Tensor | None = None
    vocabulary: VocabularyShard | None = None


def build_local_batch(batch: Batch, config: Config, tokens: LocalTokens | None, *, cached: int = 0) -> LocalBatch:
    """Take this rank's tokens out of a micro-batch, which is on the rank's device.

    Args:
        tokens: the sharding of tokens over ranks; None if this rank computes all tokens.
        cached: number of tokens before these, whose keys and values are in a cache.
    """
    positions = batch.positions
    if positions is None:
        positions = torch.arange(cached, cached + batch.ids.shape[1], device=batch.ids.device)
    if tokens is None:
        inputs = build_attention_inputs(config, positions, batch.documents, cached=cached)
        return LocalBatch(batch.ids, batch.labels, inputs, batch.weights, batch.channels)
    return LocalBatch(
        ids=tokens.local_shard(batch.ids, 0),
        labels=tokens.local_shard(batch.labels, IGNORE),
        inputs=tokens.build_attention_inputs(config, positions, batch.documents, cached=cached),
        weights=None if batch.weights is None else tokens.local_shard(batch.weights, 0.0),
        channels=None if batch.channels is None else tokens.local_shard(batch.channels, 0),
        vocabulary=tokens.vocabulary,
    )
