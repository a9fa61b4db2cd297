"""The learning rate as a function of the step, and of nothing else."""

import math
from dataclasses import dataclass

from litgpt.recipe.train import TrainArgs


@dataclass(frozen=True)
class Schedule:
    """Warm-up, then decay from the peak to the floor.

    Attributes:
        peak: the highest learning rate.
        floor: the learning rate that the decay ends on; never above the peak.
        warmup: steps of linear rise; the first step already trains, at peak / warmup.
        end: the step at which the floor is reached.
    """

    style: str
    peak: float
    floor: float
    warmup: int
    end: int
    wsd_steps: int
    wsd_style: str

    @classmethod
    def of(cls, train: TrainArgs, *, peak: float, warmup: int, steps: int) -> "Schedule":
        """The schedule of a run of `steps` optimizer steps."""
        end = train.lr_decay_steps or steps
        wsd = train.wsd_decay_steps or max(1, end // 10)
        return cls(train.lr_decay_style, peak, min(train.min_lr, peak), warmup, end, wsd, train.wsd_decay_style)

    def at(self, step: int) -> float:
        """The learning rate of optimizer step `step`, counted from 0."""
        if step < self.warmup:
            return self.peak * (step + 1) / self.warmup
        if self.style == "constant":
            return self.peak
        if self.style == "inverse-sqrt":
            return max(self.floor, self.peak * math.sqrt(max(self.warmup, 1) / (step + 1)))
        if step >= self.end:
            return self.floor
        if self.style == "wsd":
            left = self.end - step
            return self._between(self.wsd_style, 1 - left / self.wsd_steps) if left < self.wsd_steps else self.peak
        return self._between(self.style, (step - self.warmup) / (self.end - self.warmup))

    def _between(self, style: str, gone: float) -> float:
        """The rate when a share `gone` of the decay lies behind."""
        return self.floor + DECAYS[style](gone) * (self.peak - self.floor)


# What is left of peak - floor after a share x of the decay. Exponential: Hu et al. 2024 (MiniCPM); minus-sqrt: Hägele
# et al. 2024.
DECAYS = {
    "cosine": lambda x: 0.5 * (1 + math.cos(math.pi * x)),
    "linear": lambda x: 1 - x,
    "exponential": lambda x: 2 * 0.5**x - 1,
    "minus-sqrt": lambda x: 1 - math.sqrt(x),
}
