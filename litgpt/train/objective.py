"""What a run minimises: a summed loss for each micro-batch, and the count that the sums are divided by."""

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
    """A loss, and what it is a mean over.

    Attributes:
        loss: of a model and a local batch: the sum of its losses in nats, and figures to log: `channels` (2, C), sum
            and number of the losses of each channel, if the batch has channels.
        count: how many losses a micro-batch holds; sums are divided by the count of the whole global batch.
        weigh: sets the weights of a micro-batch, before it is sharded into local batches.
    """

    loss: Callable[[nn.Module, LocalBatch], tuple[Tensor, dict[str, Any]]]
    count: Callable[[Batch], float]
    weigh: Callable[[Batch], Batch]

    def __call__(self, model: nn.Module, local: LocalBatch) -> tuple[Tensor, dict[str, Any]]:
        """Call `loss`."""
        return self.loss(model, local)


def next_token(settings: LossArgs) -> Objective:
    """The negative log-likelihood of each next token, summed over a micro-batch, in nats."""
    cross_entropy: Callable[..., Tensor] = (
        partial(chunked_cross_entropy, chunk_rows=settings.chunk_rows)
        if settings.impl == "chunked"
        else plain_cross_entropy
    )

    def loss(model: nn.Module, local: LocalBatch) -> tuple[Tensor, dict[str, Any]]:
        losses_N = None if local.channels is None else torch.zeros(local.labels.numel(), device=local.labels.device)
        target = Labels(local.labels, local.weights, settings.type == "dft", losses_N)
        head = partial(cross_entropy, target=target, vocabulary=local.vocabulary)
        summed = model(local.ids, inputs=local.inputs, head=head)
        return summed, {} if losses_N is None else {"channels": sum_by_channel(local, losses_N)}

    def weigh(batch: Batch) -> Batch:
        return replace(batch, weights=SHARES[settings.normalize](batch))

    return Objective(loss, COUNTS[settings.normalize], weigh)


def sum_by_channel(local: LocalBatch, losses_N: Tensor) -> Tensor:
    """(2, C): the sum and the number of the losses of each channel; C is the highest channel number plus one."""
    assert local.channels is not None
    kept = local.labels.flatten() != IGNORE
    channels = local.channels.flatten()[kept].long()
    return torch.stack([torch.bincount(channels, weights=losses_N[kept].double()), torch.bincount(channels).double()])


def by_token(batch: Batch) -> Tensor | None:
    """Every target counts alike: the factors (B, T) are the batch's own."""
    return batch.weights


def by_micro_batch(batch: Batch) -> Tensor:
    """Every micro-batch counts alike: factors (B, T) of one over its targets."""
    return own_weights(batch) / max(batch.targets, 1)


def by_sample(batch: Batch) -> Tensor:
    """Every sample counts alike: factors (B, T) of one over the targets of the sample that a label is in."""
    sample, targets = samples_of(batch), batch.labels.ne(IGNORE)
    return own_weights(batch) / targets_of(sample, targets).clamp(min=1)[sample].view_as(batch.labels)


def own_weights(batch: Batch) -> Tensor:
    """The batch's factors (B, T), 1 if it has none."""
    return torch.ones_like(batch.labels, dtype=torch.float32) if batch.weights is None else batch.weights


def samples_of(batch: Batch) -> Tensor:
    """A number for the sample of each token, (B T,): its row, or the document in its row."""
    rows = torch.arange(len(batch.labels), device=batch.labels.device)[:, None].expand_as(batch.labels)
    if batch.documents is None:
        return rows.flatten()
    documents = batch.documents.long() + 1  # padding is document -1
    return (rows * (documents.max() + 1) + documents).flatten()


def targets_of(sample: Tensor, targets: Tensor) -> Tensor:
    """How many targets each sample has, by its number."""
    return torch.bincount(sample, weights=targets.flatten().float())


def samples_with_targets(batch: Batch) -> float:
    """How many samples hold a target."""
    return float(targets_of(samples_of(batch), batch.labels.ne(IGNORE)).gt(0).sum())


SHARES = {"token": by_token, "microbatch": by_micro_batch, "sample": by_sample}
COUNTS: dict[str, Callable[[Batch], float]] = {
    "token": lambda batch: batch.targets,
    "microbatch": lambda batch: float(batch.targets > 0),
    "sample": samples_with_targets,
}
