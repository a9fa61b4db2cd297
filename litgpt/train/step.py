"""One training step: count the targets, accumulate gradients, and update if all ranks have finite ones."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import nn

from litgpt.data.stream.batch import Batch
from litgpt.errors import UserError
from litgpt.model.attention import KVCache
from litgpt.model.gpt import Head
from litgpt.model.media import build_empty_media
from litgpt.model.tower_flops import EncodedMedia, measure_media
from litgpt.parallel import apply
from litgpt.parallel.pipeline import Pipeline, Stage
from litgpt.parallel.reduce import (
    all_reduce_max,
    all_reduce_sum,
    compute_gradient_norm,
    compute_parameter_norm,
    get_sum_device,
    scale_gradients,
)
from litgpt.train.local_batch import LocalBatch
from litgpt.train.objective import Objective
from litgpt.train.train_state import TrainState


class Votes(NamedTuple):
    """Flags that a rank sends to the others with each step; in a `StepResult`, the number of ranks that set them.

    Attributes:
        interrupted: a signal to stop was received.
        out_of_time: the run's time limit has passed.
        checkpoint_written: the pending checkpoint is ready to be committed.
        last_step: no flag, but the step at which time is expected to end the run, sent by the first rank only.
    """

    interrupted: int = 0
    out_of_time: int = 0
    checkpoint_written: int = 0
    last_step: float = 0.0


def cast_no_votes() -> Votes:
    """The votes of a step that nothing can end."""
    return Votes()


@dataclass(frozen=True)
class StepResult:
    """Result of one optimizer step; the same on every rank.

    Attributes:
        loss: the objective's loss over the global batch, in nats.
        targets: labels that are not ignored, over all data ranks.
        tokens: tokens read, without padding, over all data ranks.
        media: the sizes of images and sounds read, over all data ranks.
        skipped: whether loss or gradient was not finite; weights and moments are then unchanged.
        votes: number of ranks that set each flag.
        metrics: mean of each metric of the objective that has values in the global batch; those of routers.
    """

    loss: float
    gradient_norm: float
    targets: int
    tokens: int
    media: EncodedMedia
    skipped: bool
    votes: Votes
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class StepGradients:
    """What the gradients on the parameters are of, before an optimizer step.

    Attributes:
        loss: this rank's part of the loss, ().
        metric_sums: (2, M), the sums and numbers of the values of the objective's metrics on this rank.
        counts: the objective's counts, by which the gradients are divided, over all data ranks.
        targets, tokens, media: as in `StepResult`.
    """

    loss: torch.Tensor
    metric_sums: torch.Tensor
    counts: tuple[float, ...]
    targets: int
    tokens: int
    media: EncodedMedia

    def local_sums(self) -> list[float]:
        """The loss and the metrics of this rank, to sum over ranks."""
        return [self.loss.item(), *self.metric_sums.flatten().tolist()]


def train_step(
    train_state: TrainState,
    batches: Sequence[Batch],
    objective: Objective,
    *,
    max_norm: float | None = None,
    votes: Callable[[], Votes] = cast_no_votes,
    fault: UserError | None = None,
) -> StepResult:
    """Take one optimizer step over this rank's micro-batches of a global batch.

    Losses are divided by their counts in the whole global batch, so the gradient depends neither on the size of the
    micro-batches nor on the number of ranks.

    Args:
        max_norm: clip the gradient to this L2 norm.
        votes: returns this rank's votes; called after the gradients are computed, and reduced together with the loss.
        fault: the error for which this rank has no batches.

    Raises:
        UserError: on all ranks, before the forward pass, if any rank has a fault.
    """
    gradients = add_gradients(train_state, batches, objective, fault=fault)
    return apply_gradients(train_state, gradients, objective, max_norm=max_norm, votes=votes)


def add_gradients(
    train_state: TrainState, batches: Sequence[Batch], objective: Objective, *, fault: UserError | None = None
) -> StepGradients:
    """The first half of a step: add the gradients of this rank's micro-batches to the parameters.

    Args:
        fault: as in `train_step`.

    Raises:
        UserError: as in `train_step`.
    """
    counted = batches if train_state.counts_batch else []
    media = measure_media(train_state.core.config, (batch.media for batch in counted))
    sizes = [sum(batch.targets for batch in counted), sum(batch.tokens for batch in counted), *media]
    totals = all_reduce_sum([fault is not None, *sizes, *objective.count_batches(counted)], train_state.device)
    faults, targets, tokens, *others = totals
    media, counts = EncodedMedia(*others[: len(media)]), others[len(media) :]
    if faults:
        raise fault or UserError("data: another rank has no batch; see its error")
    metric_sums = torch.zeros(2, len(objective.metrics), dtype=torch.float64, device=get_sum_device(train_state.device))
    with train_state.measure("preparation"):
        batches = objective.prepare(train_state, batches)
    if train_state.list_tower_parameters("vision", "audio"):  # they run on all ranks, which sum their gradients
        batches = [replace(batch, media=batch.media or build_empty_media()) for batch in batches]
    if train_state.routers is not None:
        train_state.routers.begin(tokens, train_state.scale.factor)
    loss = run_batches(train_state, batches, objective, counts=counts, metric_sums=metric_sums)
    for parameter in train_state.list_tower_parameters(*media.list_idle_towers()):
        parameter.grad = None  # zeros, with which an optimizer would still change it
    return StepGradients(loss, metric_sums, tuple(counts), int(targets), int(tokens), media)


def apply_gradients(
    train_state: TrainState,
    gradients: StepGradients,
    objective: Objective,
    *,
    max_norm: float | None = None,
    votes: Callable[[], Votes] = cast_no_votes,
) -> StepResult:
    """The second half of a step: update the parameters by their gradients, if those of all ranks are finite.

    Args:
        gradients: what `add_gradients` has returned.
        max_norm, votes: as in `train_step`.
    """
    norm = finish_gradients(train_state)
    losses = [value * train_state.counts_loss for value in gradients.local_sums()]
    flags = [not math.isfinite(norm), *votes()]
    totals = all_reduce_sum([*losses, *flags], train_state.device)
    (loss, *sums), (non_finite, *counted_votes) = totals[: len(losses)], totals[len(losses) :]
    skipped = not math.isfinite(loss) or non_finite > 0
    if not skipped:
        with train_state.measure("optimizer"):
            if max_norm is not None and norm > max_norm:
                scale_gradients(train_state.parameters(), max_norm / norm)
            for optimizer in train_state.optimizers:
                optimizer.step()
    if train_state.amax_history is not None:
        train_state.amax_history.update(all_reduce_max, skipped=skipped)
    metrics = objective.compute_metrics(sums)
    if train_state.tuner_schedule is not None and not skipped:
        metrics |= train_state.tuner_schedule.end_step(train_state.optimizers, apply.copy_full_tensor)
    train_state.zero_grad()
    if train_state.routers is not None:
        metrics |= train_state.routers.finish(train_state.device, skipped=skipped)
    interrupted, out_of_time, checkpoint_written, last_step = counted_votes
    counted = Votes(int(interrupted), int(out_of_time), int(checkpoint_written), last_step)
    sizes = gradients.targets, gradients.tokens, gradients.media
    return StepResult(loss, norm, *sizes, skipped, counted, metrics)


def compute_gradients(
    train_state: TrainState,
    batches: Sequence[Batch],
    objective: Objective,
    *,
    counts: Sequence[float],
    metric_sums: torch.Tensor | None = None,
) -> tuple[float, float]:
    """Accumulate the gradients of the global batch; returns this rank's part of the loss, and the gradient norm.

    Args:
        counts: the objective's counts of the whole global batch.
        metric_sums: (2, M), to which the sum and the number of the values of each metric are added.
    """
    loss = run_batches(train_state, batches, objective, counts=counts, metric_sums=metric_sums)
    norm = finish_gradients(train_state)
    return loss.item(), norm


def run_batches(
    train_state: TrainState,
    batches: Sequence[Batch],
    objective: Objective,
    *,
    counts: Sequence[float],
    metric_sums: torch.Tensor | None,
) -> torch.Tensor:
    """Run forward and backward of this rank's micro-batches; its part of the loss, ().

    Args:
        counts, metric_sums: as in `compute_gradients`.
    """
    total = torch.zeros((), dtype=torch.float64, device=get_sum_device(train_state.device))

    def local_batch(batch: Batch) -> LocalBatch:
        batch = objective.weigh(train_state.to_device(batch))
        local = train_state.local_batch(batch)
        return local if train_state.routers is None else train_state.routers.attach(batch, local)

    def scaled_loss(model: Any, local: LocalBatch) -> torch.Tensor:
        nonlocal total
        with train_state.autocast():
            sums, metrics = objective.loss(model, local)
        # parts of means over the whole global batch
        loss = torch.stack([term / max(count, 1) for term, count in zip(sums, counts, strict=True)]).sum()
        if metric_sums is not None and metrics is not None:
            metric_sums.add_(metrics.to(metric_sums.device))
        total = total + loss.detach().to(total)
        return loss * train_state.scale.factor

    if train_state.pipeline is not None:
        with train_state.measure("forward_backward"):
            run_pipeline(train_state.pipeline, list(map(local_batch, batches)), scaled_loss)
    else:
        for number, batch in enumerate(batches, start=1):
            with apply.accumulate_gradients(train_state.model, is_last=number == len(batches)):
                with train_state.measure("forward"):
                    loss = scaled_loss(train_state.model, local_batch(batch))
                with train_state.measure("backward"):
                    loss.backward()
    return total


def finish_gradients(train_state: TrainState) -> float:
    """Remove the loss scale from the gradients, and add those of the tuner; returns their norm."""
    with train_state.measure("gradient_norm"):
        if train_state.scale.active:
            scale_gradients(train_state.parameters(), 1 / train_state.scale.factor)
        if train_state.tuner_schedule is not None:
            train_state.tuner_schedule.add_gradients(apply.copy_full_tensor)
        return compute_model_norm(train_state, compute_gradient_norm)


def compute_trained_norm(train_state: TrainState) -> float:
    """Compute the L2 norm of all trained parameters of the whole model."""
    apply.reshard_parameters(train_state.core)
    return compute_model_norm(train_state, compute_parameter_norm)


def run_pipeline(
    pipeline: Pipeline, batches: Sequence[LocalBatch], loss: Callable[[Any, LocalBatch], torch.Tensor]
) -> None:
    """Accumulate the gradients of a step's micro-batches on the parameters of this rank's stages."""

    def forward(stage: Stage, index: int) -> torch.Tensor:
        return (loss if stage.last else run_model)(stage, batches[index])

    with apply.accumulate_pipeline_gradients(pipeline.model, sync_each=pipeline.needs_sync_each):
        pipeline.step([batch.ids.shape for batch in batches], forward)
    pipeline.sum_tied_gradients()


def run_model(model: Any, local: LocalBatch, head: Head | None = None, cache: KVCache | None = None) -> Any:
    """Run a model, or one of its pipeline stages, on a local batch."""
    return model(local.ids, inputs=local.inputs, media=local.media, head=head, cache=cache)


def compute_model_norm(train_state: TrainState, compute: Callable[[list[nn.Parameter]], torch.Tensor]) -> float:
    """Compute the L2 norm of the parameters of the whole model, or of their gradients.

    Args:
        compute: the norm of the trained parameters of this rank's stages.
    """
    pipeline, named = train_state.pipeline, train_state.core.named_parameters()
    copies = pipeline.tied_copies if pipeline else ()
    norm = compute([item for name, item in named if name not in copies and item.requires_grad])
    return (pipeline.reduce_norm(norm) if pipeline else norm).item()
