"""When a limit on time ends a run, estimated from the time of its steps."""

import math


class Pace:
    """The mean time of a run's steps, and the number of steps that a limit on time allows at this pace.

    Seconds are those of a process, evaluation and saving included. Its first step, which compiles, is not counted.

    Args:
        limit: seconds of a process; None without a limit.
    """

    def __init__(self, limit: float | None) -> None:
        self.limit = limit
        self.steps, self.seconds = 0, 0.0  # of the whole run
        self._before: float | None = None

    def record(self, seconds: float) -> None:
        """Count a step that ended this many seconds after the start of the process."""
        if self._before is not None:
            self.steps, self.seconds = self.steps + 1, self.seconds + seconds - self._before
        self._before = seconds

    def estimate_last(self, step: int, seconds: float) -> float:
        """The number of steps of the run when its time will be over; infinite without a limit, or as yet unknown.

        Args:
            step: the steps that are done.
            seconds: those since the start of the process.
        """
        if self.limit is None or not self.seconds:
            return math.inf
        return step + max(0.0, self.limit - seconds) * self.steps / self.seconds

    def state_dict(self) -> dict[str, float]:
        """Return what was counted, for a checkpoint."""
        return {"steps": self.steps, "seconds": self.seconds}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Go on counting from a checkpoint."""
        self.steps, self.seconds = int(state["steps"]), state["seconds"]
