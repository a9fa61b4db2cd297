"""Garbage is collected at the steps of the interval, and by Python itself only without one."""

import gc
from typing import Any

import pytest

from litgpt.train.garbage_collection import GarbageCollection


@pytest.mark.parametrize(("interval", "expected"), [(2, [2, 4]), (0, []), (None, [])])
def test_garbage_is_collected_at_fixed_steps(interval: int | None, expected: list[int]) -> None:
    steps, current = [], 0

    def record(phase: str, info: dict[str, Any]) -> None:
        if phase == "start" and info["generation"] == 2 and not gc.isenabled():
            steps.append(current)

    gc.callbacks.append(record)
    try:
        with GarbageCollection(interval) as garbage:
            assert gc.isenabled() == (interval is None)
            for current in range(1, 6):
                garbage.collect(current)
    finally:
        gc.callbacks.remove(record)
    assert steps == expected
    assert gc.isenabled()
