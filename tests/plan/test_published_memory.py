"""Planned memory of published runs, all with the same allowance, and layouts that need less of it."""

from statistics import median

import pytest

from tests.plan.published_runs import RUNS, SMALLER, plan_memory, plan_seconds, plan_smaller

pytestmark = pytest.mark.xdist_group("published runs")  # one process plans each of them once


@pytest.mark.slow
def test_memory_is_near_that_of_published_runs() -> None:
    published = {name: run.memory for name, run in RUNS.items() if run.memory is not None}
    assert len(published) == 6
    differences = {name: plan_memory(name) / memory - 1 for name, memory in published.items()}
    assert max(map(abs, differences.values())) <= 0.15, differences
    assert median(map(abs, differences.values())) <= 0.10, differences


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALLER)
def test_another_layout_needs_less_memory_in_no_more_time(name: str) -> None:
    published = RUNS[name].memory
    smaller = plan_smaller(name)
    assert published is not None
    assert smaller.memory < min(published, plan_memory(name))
    assert smaller.seconds <= plan_seconds(name)


def test_every_run_with_published_memory_has_another_layout() -> None:
    assert {name for name, run in RUNS.items() if run.memory is not None} == set(SMALLER)
