"""Planned memory of published runs, all with the same allowance."""

from statistics import median

import pytest

from tests.plan.published_runs import RUNS, plan_memory


@pytest.mark.slow
def test_memory_is_near_that_of_published_runs() -> None:
    published = {name: run.memory for name, run in RUNS.items() if run.memory is not None}
    assert len(published) == 6
    differences = {name: plan_memory(name) / memory - 1 for name, memory in published.items()}
    assert max(map(abs, differences.values())) <= 0.15, differences
    assert median(map(abs, differences.values())) <= 0.10, differences
