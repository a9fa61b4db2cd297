"""The time of each phase of a training step."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class StepTimers:
    """Seconds of this process by phase, with the device synchronized at both ends of each phase."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}
        self.steps = 0

    @contextmanager
    def measure(self, phase: str) -> Iterator[None]:
        """Add the seconds of the block to a phase."""
        start = self._read_clock()
        try:
            yield
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + self._read_clock() - start

    def _read_clock(self) -> float:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        return time.perf_counter()

    def read(self) -> dict[str, float]:
        """The columns `timers/<phase>`: mean seconds per step since the last reading."""
        columns = {f"timers/{phase}": seconds / self.steps for phase, seconds in self.seconds.items() if self.steps}
        self.seconds, self.steps = {}, 0
        return columns
