"""Training objectives: the summed loss of a micro-batch, and the count that the sums are divided by."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from litgpt.data.stream.batch import IGNORE, Batch
from litgpt.recipe.train import LossArgs
from litgpt.train.cross_entropy import Labels, chunked_cross_entropy, plain_cross_entropy
from litgpt.train.local_batch import LocalBatch


@dataclass(frozen=True)
class Objective:
    """A loss, and the units that it is a mean over.

    Attributes:
        loss: computes, for a model and a local batch, the sum of its losses in nats, and metrics: `channels` (2, C),
            sum and number of the losses of each channel, if the batch has channels.
        count: counts the units of a micro-batch; sums are divided by the count of the whole global batch.
        weigh: sets the weights of a micro-batch, before it is sharded into local batches.
    """

    loss: Callable[[nn.Module, LocalBatch], tuple[Tensor, dict[str, Any]]]
    count: Callable[[Batch], float]
    weigh: Callable[[Batch], Batch]


def next_token(settings: LossArgs) -> Objective:
    """The negative log-likelihood of each next token, summed over a micro-batch, in nats."""
    chunked = partial(chunked_cross_entropy, chunk_rows=settings.chunk_rows)
    cross_entropy: Callable[..., Tensor] = chunked if settings.impl == "chunked" else plain_cross_entropy

    def loss(model: nn.Module, local: LocalBatch) -> tuple[Tensor, dict[str, Any]]:
        losses_N = None if local.channels is None else torch.zeros(local.labels.numel(), device=local.labels.device)
        target = Labels(local.labels, local.weights, settings.type == "dft", losses_N)
        head = partial(cross_entropy, target=target, vocabulary=local.vocabulary)
        loss_sum = model(local.ids, inputs=local.inputs, head=head)
        return loss_sum, {} if losses_N is None else {"channels": sum_by_channel(local, losses_N)}

    def weigh(batch: Batch) -> Batch:
        return replace(batch, weights=WEIGHTS[settings.normalize](batch))

    return Objective(loss, COUNTS[settings.normalize], weigh)


def sum_by_channel(local: LocalBatch, losses_N: Tensor) -> Tensor:
    """(2, C): the sum and the number of the losses of each channel; C is the highest channel number plus one."""
    assert local.channels is not None
    kept = local.labels.flatten() != IGNORE
    channels = local.channels.flatten()[kept].long()
    return torch.stack([torch.bincount(channels, weights=losses_N[kept].double()), torch.bincount(channels).double()])


def weigh_by_micro_batch(batch: Batch) -> Tensor:
    """Weights (B, T) with which every micro-batch counts equally: one over its targets."""
    return get_weights(batch) / max(batch.targets, 1)


def weigh_by_sample(batch: Batch) -> Tensor:
    """Weights (B, T) with which every sample counts equally: one over the targets of the sample of each label."""
    sample, targets = number_samples(batch), batch.labels.ne(IGNORE)
    return get_weights(batch) / count_targets(sample, targets).clamp(min=1)[sample].view_as(batch.labels)


def get_weights(batch: Batch) -> Tensor:
    """The weights (B, T) of the batch, 1 if it has none."""
    return torch.ones_like(batch.labels, dtype=torch.float32) if batch.weights is None else batch.weights


def number_samples(batch: Batch) -> Tensor:
    """The number of each token's sample, (B T,): its row, or its document in the row."""
    rows = torch.arange(len(batch.labels), device=batch.labels.device)[:, None].expand_as(batch.labels)
    if batch.documents is None:
        return rows.flatten()
    documents = batch.documents.long() + 1  # padding is document -1
    return (rows * (documents.max() + 1) + documents).flatten()


def count_targets(sample: Tensor, targets: Tensor) -> Tensor:
    """The number of targets of each sample."""
    return torch.bincount(sample, weights=targets.flatten().float())


def count_samples_with_targets(batch: Batch) -> float:
    """The number of samples with a target."""
    return float(count_targets(number_samples(batch), batch.labels.ne(IGNORE)).gt(0).sum())


WEIGHTS: dict[str, Callable[[Batch], Tensor | None]] = {
    "token": lambda batch: batch.weights,
    "microbatch": weigh_by_micro_batch,
    "sample": weigh_by_sample,
}
COUNTS: dict[str, Callable[[Batch], float]] = {
    "token": lambda batch: batch.targets,
    "microbatch": lambda batch: float(batch.targets > 0),
    "sample": count_samples_with_targets,
}
