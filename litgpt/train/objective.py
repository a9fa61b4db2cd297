"""Training objectives: the summed losses of a micro-batch, and the counts that the sums are divided by."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor, nn

from litgpt.data.stream.batch import IGNORE, Batch
from litgpt.recipe.train import LossArgs
from litgpt.train.cross_entropy import Labels, chunked_cross_entropy, plain_cross_entropy
from litgpt.train.local_batch import LocalBatch
from litgpt.train.predictions import compute_prediction_losses, take_later_tokens
from litgpt.train.train_state import TrainState


def keep_batches(_train_state: TrainState, batches: Sequence[Batch]) -> list[Batch]:
    """The batches as they are."""
    return list(batches)


@dataclass(frozen=True)
class Objective:
    """A loss of K terms, each a mean over units of its own, and metrics.

    Attributes:
        loss: computes, for a model and a local batch, the sum of each term in nats (K,), and of the metrics the sum and
            the number of values (2, M); None if the batch has none.
        count: counts the units of each term in a micro-batch; sums are divided by the counts of the whole global batch.
        weigh: sets the weights of a micro-batch, before it is sharded into local batches.
        prepare: completes all micro-batches of this rank in a step, before the first forward pass with gradients.
        metrics: names of the metrics; one without values in a global batch is left out.
        differences: metrics that are the difference of the means of two others.
        terms: the number of terms K.
        has_perplexity: whether the loss is a negative log-likelihood per token.
    """

    loss: Callable[[nn.Module, LocalBatch], tuple[Tensor, Tensor | None]]
    count: Callable[[Batch], tuple[float, ...]]
    weigh: Callable[[Batch], Batch]
    prepare: Callable[[TrainState, Sequence[Batch]], list[Batch]] = keep_batches
    metrics: tuple[str, ...] = ()
    differences: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    terms: int = 1
    has_perplexity: bool = False

    def count_batches(self, batches: Sequence[Batch]) -> list[float]:
        """The counts (K) of several micro-batches together; zeros for none."""
        counts = [self.count(batch) for batch in batches]
        return [sum(count[term] for count in counts) for term in range(self.terms)]

    def compute_metrics(self, sums: Sequence[float]) -> dict[str, float]:
        """The metrics that have values, given the sums of all of `metrics` and then the numbers of their values."""
        numbers = sums[len(self.metrics) :]
        totals = zip(self.metrics, sums, numbers, strict=False)
        means = {name: total / number for name, total, number in totals if number}
        differences = {
            name: means[first] - means[second]
            for name, (first, second) in self.differences.items()
            if first in means and second in means
        }
        return means | differences


def next_token(settings: LossArgs, channels: Sequence[str] = (), *, prediction_layers: int = 0) -> Objective:
    """The negative log-likelihood of each next token, summed over a micro-batch, in nats.

    The losses of prediction layers, with the same divisor, are trained but not part of the sum: the mean of each over
    its labels is a metric.

    Args:
        channels: the names of the numbers in `Batch.channels`; the mean loss of each is a metric.
        prediction_layers: the number of the model's prediction layers, if they are trained.
    """
    chunked = partial(chunked_cross_entropy, chunk_rows=settings.chunk_rows)
    cross_entropy: Callable[..., Tensor] = chunked if settings.impl == "chunked" else plain_cross_entropy
    predictions = [f"prediction_loss/{number}" for number in range(1, prediction_layers + 1)]
    names = (*(f"loss_{name}" for name in channels), *predictions)

    def loss(model: nn.Module, local: LocalBatch) -> tuple[Tensor, Tensor | None]:
        losses_N = None if local.channels is None else torch.zeros(local.labels.numel(), device=local.labels.device)
        target = Labels(local.labels, local.weights, settings.type == "dft", losses_N)
        head = partial(cross_entropy, vocabulary=local.vocabulary)
        sums = torch.zeros(2, 0, dtype=torch.float64, device=local.labels.device)
        if local.later_tokens is None:
            head = partial(head, target=target)
            loss_sum = model(local.ids, inputs=local.inputs, media=local.media, head=head)
        else:
            loss_sum, predicted, sums = compute_prediction_losses(model, local, head, target)
            loss_sum = loss_sum + settings.prediction_weight * (predicted - predicted.detach())  # trained, not reported
        metrics = torch.cat([sum_by_channel(local, losses_N, len(channels)), sums], 1)
        return loss_sum[None], metrics if names else None

    def weigh(batch: Batch) -> Batch:
        weighted = replace(batch, weights=WEIGHTS[settings.normalize](batch))
        later_tokens = take_later_tokens(weighted, prediction_layers) if prediction_layers else None
        return replace(weighted, later_tokens=later_tokens)

    def count(batch: Batch) -> tuple[float]:
        return (COUNTS[settings.normalize](batch),)

    return Objective(loss, count, weigh, has_perplexity=True, metrics=names)


def sum_by_channel(local: LocalBatch, losses_N: Tensor | None, size: int) -> Tensor:
    """(2, size): the sum and the number of the losses of each channel; zeros for a batch without channels."""
    if losses_N is None or local.channels is None:
        return torch.zeros(2, size, dtype=torch.float64, device=local.labels.device)
    kept = local.labels.flatten() != IGNORE
    channels = local.channels.flatten()[kept].long()
    sums = torch.bincount(channels, losses_N[kept].double(), minlength=size)
    return torch.stack([sums, torch.bincount(channels, minlength=size).double()])


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
