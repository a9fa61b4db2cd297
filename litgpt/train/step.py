"""The one training step: count before you divide, agree before you step."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

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
    """A model laid out over its ranks, with what steps it; without a mesh it is alone."""

    model: nn.Module
    optimizers: list[torch.optim.Optimizer]
    device: torch.device
    precision: Precision
    mesh: Mesh | None = None
    scale: LossScale = field(default_factory=lambda: LossScale(active=False))
    lisa_schedule: LISASchedule | None = None

    @property
    def sharded(self) -> bool:
        """Whether FSDP2 has the model, and casts its weights."""
        return is_sharded(self.mesh)

    @property
    def counts_batch(self) -> bool:
        """Whether this rank is the one that tells of its batch, on which several may work."""
        return self.mesh is None or self.mesh.is_batch_leader

    @property
    def counts_loss(self) -> bool:
        """Whether this rank's loss is to be added to that of the others."""
        here = self.pipeline is None or self.pipeline.has_last
        return here and (self.mesh is None or self.mesh.is_loss_leader)

    @property
    def pipeline(self) -> Pipeline | None:
        """What the model's layers are spread over, if they are."""
        return getattr(self.core, "pipeline", None)

    @property
    def core(self) -> nn.Module:
        """The model without the wrapper that sums gradients."""
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
        """What is trained."""
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
        """Forget all gradients."""
        for parameter in self.parameters():
            parameter.grad = None


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did; the same on every rank.

    Attributes:
        loss: mean over what the objective counts in the global batch, in nats.
        targets: labels that counted, over all data ranks.
        tokens: all that were read, padding apart, over all data ranks.
        taken: False if loss or gradient was not finite, and so nothing was changed.
        asked: how many ranks raised each of the caller's flags.
        channels: mean loss of each channel, without factors; NaN where the global batch had none of it.
    """

    loss: float
    gradient_norm: float
    targets: int
    tokens: int
    taken: bool
    asked: tuple[int, ...]
    channels: tuple[float, ...] = ()


def train_step(
    train_state: TrainState,
    batches: Sequence[Batch],
    objective: Objective,
    *,
    max_norm: float | None = None,
    flags: Sequence[bool] = (),
    channels: int = 0,
    fault: UserError | None = None,
) -> StepResult:
    """One optimizer step over this rank's micro-batches of a global batch.

    The loss of every micro-batch is a share of one mean over the whole global batch, so the gradient depends neither on
    how the batch was cut nor on how many ranks it was spread over.

    Args:
        max_norm: clip the gradient to this L2 norm.
        flags: what this rank wishes to tell the others; travels with the count.
        channels: how many the data has.
        fault: why this rank has no batches.

    Raises:
        UserError: on all ranks, before anything is computed, if any has a fault.
    """
    told = batches if train_state.counts_batch else []
    mine = [sum(map(objective.count, told)), sum(b.targets for b in told), sum(b.tokens for b in told)]
    count, targets, tokens, *asked, faults = all_reduce_sum([*mine, *flags, fault is not None], train_state.device)
    if faults:
        raise fault or UserError("data: another rank cannot go on, for the reason that it gives")
    tally = torch.zeros(2, channels, dtype=torch.float64)
    loss, norm = gradients(train_state, batches, objective, count=count, tally=tally)
    losses_here = [loss, *tally.flatten().tolist()] if train_state.counts_loss else [0.0] * (1 + tally.numel())
    loss, *by_channel, bad = all_reduce_sum([*losses_here, not math.isfinite(norm)], train_state.device)
    finite = math.isfinite(loss) and not bad
    if finite:
        if max_norm is not None and norm > max_norm:
            scale_gradients(train_state.parameters(), max_norm / norm)
        for optimizer in train_state.optimizers:
            optimizer.step()
    train_state.zero_grad()
    sums, numbers = by_channel[:channels], by_channel[channels:]
    means = [one / number if number else math.nan for one, number in zip(sums, numbers, strict=True)]
    return StepResult(loss, norm, int(targets), int(tokens), finite, tuple(int(ranks) for ranks in asked), tuple(means))


def gradients(
    train_state: TrainState,
    batches: Sequence[Batch],
    objective: Objective,
    *,
    count: float,
    tally: torch.Tensor | None = None,
) -> tuple[float, float]:
    """Leave the global batch's gradient on the parameters; returns this rank's share of the loss, and the norm.

    Args:
        count: the objective's count of the whole global batch.
        tally: (2, C), takes in the sum and the number of the losses of each channel.
    """
    shares = torch.zeros((), dtype=torch.float64)

    def local_batch(batch: Batch) -> LocalBatch:
        return train_state.local_batch(objective.weigh(batch.to(train_state.device)))

    def scaled_loss(model: Any, local: LocalBatch) -> torch.Tensor:
        nonlocal shares
        with train_state.precision.autocast(train_state.device, sharded=train_state.sharded):
            summed, told = objective(model, local)
        share = summed / max(count, 1)  # a share of one mean over the whole global batch
        if tally is not None and "channels" in told:
            tally[:, : told["channels"].shape[1]] += told["channels"].to(tally.device)
        shares = shares + share.detach().double().to(shares.device, non_blocking=True)
        return share * train_state.scale.factor

    if train_state.pipeline is not None:
        through_stages(train_state.pipeline, [local_batch(batch) for batch in batches], scaled_loss)
    else:
        for number, batch in enumerate(batches, start=1):
            with accumulate_gradients(train_state.model, is_last=number == len(batches)):
                scaled_loss(train_state.model, local_batch(batch)).backward()
    if train_state.scale.active:
        scale_gradients(train_state.parameters(), 1 / train_state.scale.factor)
    return shares.item(), norm_of(train_state)


def through_stages(
    pipeline: Pipeline, batches: Sequence[LocalBatch], loss: Callable[[Any, LocalBatch], torch.Tensor]
) -> None:
    """Leave the gradients of all micro-batches of a step on the parameters of the stages that lie here."""

    def run(stage: Stage, number: int) -> torch.Tensor:
        return (loss if stage.last else run_model)(stage, batches[number])

    with accumulate_pipeline_gradients(pipeline.model, sync_each=pipeline.needs_sync_each):
        pipeline.step([batch.ids.shape for batch in batches], run)
    pipeline.sum_tied_gradients()


def run_model(model: Any, local: LocalBatch, head: Head | None = None) -> Any:
    """The output of a model, or of a pipeline stage of it, for a local batch."""
    return model(local.ids, inputs=local.inputs, head=head)


def norm_of(train_state: TrainState) -> float:
    """The L2 norm of the whole model's gradient."""
    pipeline = train_state.pipeline
    if pipeline is None:
        return compute_gradient_norm(train_state.parameters()).item()
    named = train_state.core.named_parameters()
    norm = compute_gradient_norm(parameter for name, parameter in named if name not in pipeline.tied_copies)
    return pipeline.reduce_norm(norm).item()


def evaluate(train_state: TrainState, batch: LocalBatch, run: Callable[[Any], Any]) -> Any:
    """What `run` makes of the model for a local batch, without gradients; None where the last layers do not lie."""
    if train_state.pipeline is None:
        return run(train_state.core)
    return train_state.pipeline.evaluate(
        batch.ids.shape, lambda stage: run(stage) if stage.last else run_model(stage, batch)
    )
