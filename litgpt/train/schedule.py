"""The optimizer steps of a run, and the learning rate of each."""

import math
from dataclasses import dataclass

from litgpt.errors import UserError
from litgpt.recipe.train import TrainArgs


@dataclass(frozen=True)
class Schedule:
    """The learning rate as a function of the step: linear warm-up, then decay from the peak to the floor.

    Attributes:
        peak: the highest learning rate.
        floor: the learning rate at the end of the decay; at most the peak.
        warmup: steps of warm-up; the first step trains at peak / warmup.
        end: the step at which the floor is reached; infinite for a run without a limit on steps.
        is_fixed: whether it is reached there even if a limit on time ends the run before.
        wsd_steps: steps of the decay phase of `wsd`; None for a tenth of the run.
    """

    style: str
    peak: float
    floor: float
    warmup: int
    end: float
    is_fixed: bool
    wsd_steps: int | None
    wsd_style: str

    @classmethod
    def from_args(cls, train: TrainArgs, *, peak: float, warmup: int, steps: int | None) -> "Schedule":
        """Build the schedule of a run of `steps` optimizer steps; None for a run without a limit."""
        end = train.lr_decay_steps or steps or math.inf
        floor = peak if train.min_lr is None else min(train.min_lr, peak)
        fixed, wsd_steps, wsd_style = train.lr_decay_steps is not None, train.wsd_decay_steps, train.wsd_decay_style
        return cls(train.lr_decay_style, peak, floor, warmup, end, fixed, wsd_steps, wsd_style)

    def at(self, step: int, *, last: float = math.inf) -> float:
        """The learning rate of optimizer step `step`, counted from 0.

        Args:
            last: the number of steps after which a limit on time is expected to end the run.
        """
        end = self.end if self.is_fixed else min(self.end, last)
        if step < self.warmup:
            return self.peak * (step + 1) / self.warmup
        if self.style == "constant":
            return self.peak
        if self.style == "inverse-sqrt":
            return max(self.floor, self.peak * math.sqrt(max(self.warmup, 1) / (step + 1)))
        if step >= end:
            return self.floor
        if self.style == "wsd":
            left, decay = end - step, self.wsd_steps or max(1, end // 10)
            return self._between(self.wsd_style, 1 - left / decay) if left < decay else self.peak
        return self._between(self.style, (step - self.warmup) / (end - self.warmup))

    def _between(self, style: str, elapsed: float) -> float:
        """The learning rate after a share `elapsed` of the decay."""
        return self.floor + DECAYS[style](elapsed) * (self.peak - self.floor)


# Remaining share of peak - floor after a share x of the decay. Exponential: Hu et al. 2024 (MiniCPM); minus-sqrt:
# Hägele et al. 2024.
DECAYS = {
    "cosine": lambda x: 0.5 * (1 + math.cos(math.pi * x)),
    "linear": lambda x: 1 - x,
    "exponential": lambda x: 2 * 0.5**x - 1,
    "minus-sqrt": lambda x: 1 - math.sqrt(x),
}


def list_step_limits(
    train: TrainArgs, length: int, samples_per_epoch: int | None, *, answers: int = 1
) -> dict[str, int]:
    """List the optimizer steps that each limit on steps, tokens or epochs allows, by its key.

    Args:
        length: tokens per sample, or per answer of a sample.
        answers: answers per sample.

    Raises:
        UserError: if an epoch's length is needed and the data does not have one, or the limit is less than a step.
    """
    limits = {"train.max_steps": train.max_steps} if train.max_steps else {}
    if train.max_tokens:
        tokens = train.global_batch_size * length * answers
        limits["train.max_tokens"] = train.max_tokens // tokens
        if not limits["train.max_tokens"]:
            samples = train.max_tokens // (length * answers) // train.micro_batch_size * train.micro_batch_size
            factor = "" if answers == 1 else f" x {answers} answers"
            raise UserError(
                f"train.max_tokens: {train.max_tokens} is less than one step of global_batch_size x max_seq_length"
                f"{factor} = {tokens} tokens; set train.max_tokens: {tokens}"
                + (f", or train.global_batch_size: {samples}" if samples else "")
            )
    if train.epochs:
        if samples_per_epoch is None:
            raise UserError(
                f"train.epochs: {train.epochs}, but the data has no known length; set train.epochs: null and "
                "train.max_steps"
            )
        limits["train.epochs"] = math.ceil(train.epochs * samples_per_epoch / train.global_batch_size)
    return limits


def count_steps(train: TrainArgs, length: int, samples_per_epoch: int | None, *, answers: int = 1) -> int | None:
    """Count the optimizer steps of a run by its lowest limit; None if the recipe sets no limit on steps."""
    return min(list_step_limits(train, length, samples_per_epoch, answers=answers).values(), default=None)


def count_warmup_steps(train: TrainArgs, steps: int | None) -> int:
    """Count the optimizer steps of warm-up, at most the `steps` of the run.

    A fraction is of `lr_decay_steps`, or of the run without them, as in Megatron-LM.

    Raises:
        UserError: for a fraction of a run without a number of steps.
    """
    warmup = train.lr_warmup_steps or 0
    if train.lr_warmup_fraction is not None:
        end = train.lr_decay_steps or steps
        if end is None:
            raise UserError(
                f"train.lr_warmup_fraction: {train.lr_warmup_fraction} needs the number of steps; set train.max_steps, "
                "or lr_warmup_steps instead"
            )
        warmup = math.ceil(round(train.lr_warmup_fraction * end, 6))
    return warmup if steps is None else min(warmup, steps)
