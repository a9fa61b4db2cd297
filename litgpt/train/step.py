"""The one training step: count before you divide, agree before you step."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn

from litgpt.adapt.lisa import LISASchedule
from litgpt.data.stream.batch import Batch
from litgpt.errors import UserError
from litgpt.model.gpt import Head
from litgpt.parallel.apply import (
    accumulate_gradients,
    accumulate_pipeline_gradients,
    apply_ddp,
    is_sharded,
    unwrap_model,
)
from litgpt.parallel.mesh import Mesh
from litgpt.parallel.pipeline import Pipeline, Stage
from litgpt.parallel.precision import Precision
from litgpt.parallel.reduce import all_reduce_sum, compute_gradient_norm, scale_gradients
from litgpt.parallel.token_sharding import LocalTokens
from litgpt.train.guard import LossScale
from litgpt.train.local_batch import LocalBatch, build_local_batch
from litgpt.train.objective import Objective


@dataclass
class TrainState:
    """A model with its layout, and the state that trains it; `mesh` is None in a single process."""

    model: nn.Module
    optimizers: list[torch.optim.Optimizer]
    device: torch.device
    precision: Precision
    mesh: Mesh | None = None
    scale: LossScale = field(default_factory=lambda: LossScale(active=False))
    lisa_schedule: LISASchedule | None = None

    @property
    def sharded(self) -> bool:
        """Whether FSDP2 shards the model and casts its weights."""
        return is_sharded(self.mesh)

    @property
    def counts_batch(self) -> bool:
        """Whether this rank counts its batch, which other ranks may share."""
        return self.mesh is None or self.mesh.is_batch_leader

    @property
    def counts_loss(self) -> bool:
        """Whether this rank's loss is part of the sum over all ranks."""
        has_loss = self.pipeline is None or self.pipeline.has_last
        return has_loss and (self.mesh is None or self.mesh.is_loss_leader)

    @property
    def pipeline(self) -> Pipeline | None:
        """The pipeline over which the model's layers are split; None without one."""
        return getattr(self.core, "pipeline", None)

    @property
    def core(self) -> nn.Module:
        """The model without the DDP wrapper."""
        return unwrap_model(self.model)

    @property
    def local_tokens(self) -> LocalTokens | None:
        """The sharding of tokens over ranks, None if this rank computes all tokens of its batches."""
        return getattr(self.core, "local_tokens", None)

    def local_batch(self, batch: Batch) -> LocalBatch:
        """This rank's tokens of a micro-batch, which is on the rank's device."""
        config: Any = self.core.config
        return build_local_batch(batch, config, self.local_tokens)

    def parameters(self) -> list[nn.Parameter]:
        """The trained parameters."""
        return [parameter for parameter in self.core.parameters() if parameter.requires_grad]

    def set_active(self, step: int) -> None:
        """Train the blocks that the tuner schedules for a step; drop the moments of those that become frozen."""
        frozen = self.lisa_schedule.set_active(step) if self.lisa_schedule else []
        for parameter in frozen:
            for optimizer in self.optimizers:
                optimizer.state.pop(parameter, None)
        if frozen:
            self.model = apply_ddp(self.core, self.mesh)

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for parameter in self.parameters():
            parameter.grad = None


class Votes(NamedTuple):
    """What a rank tells the others with a step; in a `StepResult` the number of ranks that do.

    Attributes:
        interrupted: a signal asks the run to stop.
        out_of_time: the run's time limit has passed.
        checkpoint_written: the pending checkpoint is ready to be committed.
    """

    interrupted: int = 0
    out_of_time: int = 0
    checkpoint_written: int = 0


NO_VOTES = Votes()


@dataclass(frozen=True)
class StepResult:
    """Result of one optimizer step; the same on every rank.

    Attributes:
        loss: mean over what the objective counts in the global batch, in nats.
        targets: labels that are not ignored, over all data ranks.
        tokens: tokens read, without padding, over all data ranks.
        taken: False if loss or gradient was not finite; weights and moments are unchanged then.
        votes: how many ranks cast each vote.
        channels: mean unweighted loss of each channel; NaN for channels that are not in the global batch.
    """

    loss: float
    gradient_norm: float
    targets: int
    tokens: int
    taken: bool
    votes: Votes
    channels: tuple[float, ...] = ()


def train_step(
    train_state: TrainState,
    batches: Sequence[Batch],
    objective: Objective,
    *,
    max_norm: float | None = None,
    votes: Votes = NO_VOTES,
    channels: int = 0,
    fault: UserError | None = None,
) -> StepResult:
    """Take one optimizer step over this rank's micro-batches of a global batch.

    Losses are divided by the count of the whole global batch, so the gradient depends neither on the size of the
    micro-batches nor on the number of ranks.

    Args:
        max_norm: clip the gradient to this L2 norm.
        votes: this rank's votes; reduced together with the count.
        channels: number of channels of the data.
        fault: the error for which this rank has no batches.

    Raises:
        UserError: on all ranks, before the forward pass, if any rank has a fault.
    """
    counted = batches if train_state.counts_batch else []
    counts = [sum(map(objective.count, counted)), sum(b.targets for b in counted), sum(b.tokens for b in counted)]
    count, targets, tokens, *cast, faults = all_reduce_sum([*counts, *votes, fault is not None], train_state.device)
    if faults:
        raise fault or UserError("data: another rank has no batch; see its error")
    tally = torch.zeros(2, channels, dtype=torch.float64)
    loss, norm = compute_gradients(train_state, batches, objective, count=count, tally=tally)
    local_losses = [loss, *tally.flatten().tolist()] if train_state.counts_loss else [0.0] * (1 + tally.numel())
    loss, *by_channel, bad = all_reduce_sum([*local_losses, not math.isfinite(norm)], train_state.device)
    finite = math.isfinite(loss) and not bad
    if finite:
        if max_norm is not None and norm > max_norm:
            scale_gradients(train_state.parameters(), max_norm / norm)
        for optimizer in train_state.optimizers:
            optimizer.step()
    train_state.zero_grad()
    sums, numbers = by_channel[:channels], by_channel[channels:]
    means = tuple(total / number if number else math.nan for total, number in zip(sums, numbers, strict=True))
    return StepResult(loss, norm, int(targets), int(tokens), finite, Votes(*map(int, cast)), means)


def compute_gradients(
    train_state: TrainState,
    batches: Sequence[Batch],
    objective: Objective,
    *,
    count: float,
    tally: torch.Tensor | None = None,
) -> tuple[float, float]:
    """Accumulate the global batch's gradient on the parameters; returns this rank's share of the loss, and the norm.

    Args:
        count: the objective's count of the whole global batch.
        tally: (2, C), to which the sum and the number of the losses of each channel are added.
    """
    shares = torch.zeros((), dtype=torch.float64)

    def local_batch(batch: Batch) -> LocalBatch:
        return train_state.local_batch(objective.weigh(batch.to(train_state.device)))

    def scaled_loss(model: Any, local: LocalBatch) -> torch.Tensor:
        nonlocal shares
        with train_state.precision.autocast(train_state.device, sharded=train_state.sharded):
            loss_sum, metrics = objective(model, local)
        share = loss_sum / max(count, 1)  # a share of one mean over the whole global batch
        if tally is not None and "channels" in metrics:
            tally[:, : metrics["channels"].shape[1]] += metrics["channels"].to(tally.device)
        shares = shares + share.detach().double().to(shares.device, non_blocking=True)
        return share * train_state.scale.factor

    if train_state.pipeline is not None:
        run_pipeline(train_state.pipeline, [local_batch(batch) for batch in batches], scaled_loss)
    else:
        for number, batch in enumerate(batches, start=1):
            with accumulate_gradients(train_state.model, is_last=number == len(batches)):
                scaled_loss(train_state.model, local_batch(batch)).backward()
    if train_state.scale.active:
        scale_gradients(train_state.parameters(), 1 / train_state.scale.factor)
    return shares.item(), compute_model_norm(train_state)


def run_pipeline(
    pipeline: Pipeline, batches: Sequence[LocalBatch], loss: Callable[[Any, LocalBatch], torch.Tensor]
) -> None:
    """Accumulate the gradients of a step's micro-batches on the parameters of this rank's stages."""

    def run(stage: Stage, number: int) -> torch.Tensor:
        return (loss if stage.last else run_model)(stage, batches[number])

    with accumulate_pipeline_gradients(pipeline.model, sync_each=pipeline.needs_sync_each):
        pipeline.step([batch.ids.shape for batch in batches], run)
    pipeline.sum_tied_gradients()


def run_model(model: Any, local: LocalBatch, head: Head | None = None) -> Any:
    """The output of a model, or of a pipeline stage of it, for a local batch."""
    return model(local.ids, inputs=local.inputs, head=head)


def compute_model_norm(train_state: TrainState) -> float:
    """Compute the L2 norm of the whole model's gradient."""
    pipeline = train_state.pipeline
    if pipeline is None:
        return compute_gradient_norm(train_state.parameters()).item()
    named = train_state.core.named_parameters()
    norm = compute_gradient_norm(parameter for name, parameter in named if name not in pipeline.tied_copies)
    return pipeline.reduce_norm(norm).item()


def evaluate(train_state: TrainState, batch: LocalBatch, run: Callable[[Any], Any]) -> Any:
    """Apply `run` to the model for a local batch, without gradients; None on ranks without the last stage."""
    if train_state.pipeline is None:
        return run(train_state.core)
    return train_state.pipeline.evaluate(
        batch.ids.shape, lambda stage: run(stage) if stage.last else run_model(stage, batch)
    )
