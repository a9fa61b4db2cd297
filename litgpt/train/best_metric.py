"""The best value of a metric over the evaluations of a run, and the number of evaluations since."""

import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from litgpt.errors import UserError
from litgpt.recipe.train import BestArgs
from litgpt.store.step_folders import get_step_folder


class BestMetric:
    """Records the evaluations of a run, and finds the best one by a metric.

    Without settings nothing is recorded.

    Args:
        patience: number of evaluations without a better value after which training stops; None for no limit.

    Attributes:
        step: the step of the best value; None without one.
        value: the best value, which is finite; None without one.
        evaluations_since: number of evaluations after the best one.
    """

    def __init__(self, settings: BestArgs | None, patience: int | None = None) -> None:
        self.settings, self.patience = settings, patience
        self.step: int | None = None
        self.value: float | None = None
        self.evaluations_since = 0

    def record(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Record an evaluation; returns whether it is the best one so far. NaN and infinity never are, nor is a tie.

        Raises:
            UserError: if the evaluation does not have the metric.
        """
        if self.settings is None:
            return False
        self.check_metric(metrics)
        value = metrics[self.settings.metric]
        sign = 1 if self.settings.direction == "min" else -1
        if is_best := math.isfinite(value) and (self.value is None or sign * value < sign * self.value):
            self.step, self.value = step, value
        self.evaluations_since = 0 if is_best else self.evaluations_since + 1
        return is_best

    def check_metric(self, names: Collection[str]) -> None:
        """Check that the metric is among those of a run.

        Raises:
            UserError: naming those.
        """
        if self.settings and self.settings.metric not in names:
            metric, known = self.settings.metric, " or ".join(names)
            raise UserError(f"checkpoint.best.metric: {metric} is not a metric of this run; use {known}")

    @property
    def is_exhausted(self) -> bool:
        """Whether `patience` evaluations were not better."""
        return self.patience is not None and self.evaluations_since >= self.patience

    def describe(self, out_dir: Path | None = None) -> str | None:
        """The best value and its step, and the folder of that checkpoint in `out_dir` if it is there; None without."""
        if self.settings is None or self.value is None or self.step is None:
            return None
        text = f"{self.settings.metric} {self.value:.4f} at step {self.step:,}"
        folder = out_dir and get_step_folder(out_dir, self.step)
        return f"{text}: {folder}" if folder and folder.is_dir() else text

    def get_stop_reason(self) -> str:
        """The reason why the run stops, once the patience is exhausted."""
        best = self.describe() or "no finite value"
        return f"train.patience: {self.evaluations_since} evaluations without a better one; the best is {best}"

    def state_dict(self) -> dict[str, Any] | None:
        """Return the state for a checkpoint; None without settings."""
        if self.settings is None:
            return None
        names = {"metric": self.settings.metric, "mode": self.settings.direction}
        return {**names, "step": self.step, "value": self.value, "evaluations_since": self.evaluations_since}

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Restore a state; that of another metric or mode is ignored, so that the search for the best starts again."""
        if (
            self.settings
            and state
            and (state["metric"], state["mode"]) == (self.settings.metric, self.settings.direction)
        ):
            self.step, self.value, self.evaluations_since = state["step"], state["value"], state["evaluations_since"]
