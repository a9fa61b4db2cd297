"""The phases of a step are measured, and read as seconds per step."""

from typing import Any

import pytest
import torch

from litgpt.train import step_timers


def test_seconds_are_means_over_the_steps_since_the_last_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 1.0, 4.0, 5.0, 5.5, 7.0, 7.25])
    monkeypatch.setattr(step_timers.time, "perf_counter", lambda: next(clock))
    timers: Any = step_timers.StepTimers(torch.device("cpu"))
    assert timers.read() == {}
    for phases in (("data", "forward"), ("data",)):
        timers.steps += 1
        for phase in phases:
            with timers.measure(phase):
                pass
    assert timers.read() == {"timers/data": 0.75, "timers/forward": 1.5}
    timers.steps += 1
    with timers.measure("data"):
        pass
    assert timers.read() == {"timers/data": 0.25}
