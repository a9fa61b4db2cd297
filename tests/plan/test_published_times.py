"""Estimated times of published runs, all with the same efficiencies, and the order of pairs of them."""

import pytest

from tests.plan.published_runs import RUNS, plan_seconds

pytestmark = pytest.mark.xdist_group("published runs")  # one process plans each of them once

NEAR = [
    *("megatron-14b", "zero2-14b", "zero3-14b", "megatron-30b-a3b-tensor", "automodel-30b-a3b"),
    *("automodel-30b-a3b-recomputed", "automodel-8b-lora", "titan-8", "titan-8-eager"),
]
"""The runs whose times the shares of peaks were chosen for."""
PAIRS = [
    ("megatron-14b", "zero2-14b"),
    ("megatron-14b", "zero3-14b"),
    ("zero2-14b", "zero3-14b"),
    ("automodel-30b-a3b", "transformers-30b-a3b"),
    ("titan-8", "titan-8-eager"),
    ("titan-8-fp8", "titan-8"),
    ("titan-128", "titan-128-eager"),
    ("titan-8", "titan-128"),
    ("titan-8-eager", "titan-128-eager"),
    ("titan-13b", "titan-13b-recomputed"),
    ("mpt-7b-2k-h100", "mpt-7b-2k"),
    ("mpt-30b-4k", "mpt-30b-8k"),
    ("mpt-30b-2k", "mpt-30b-4k"),
]
"""Pairs of runs of one table that differ in one setting, or in the micro-batch that it leaves memory for; the run with
more tokens per second and GPU first."""


@pytest.mark.slow
@pytest.mark.parametrize("name", [*NEAR, "titan-8-fp8"])
def test_times_are_near_published_ones(name: str) -> None:
    assert plan_seconds(name) == pytest.approx(RUNS[name].seconds, rel=0.25)


@pytest.mark.slow
def test_pairs_of_runs_are_in_the_published_order() -> None:
    speeds = {name: count_tokens(name) / plan_seconds(name) for pair in PAIRS for name in pair}
    published = {name: count_tokens(name) / RUNS[name].seconds for name in speeds}
    assert all(published[faster] > published[slower] for faster, slower in PAIRS)
    reversed_pairs = [pair for pair in PAIRS if speeds[pair[0]] < speeds[pair[1]]]
    assert len(PAIRS) - len(reversed_pairs) >= 0.8 * len(PAIRS), reversed_pairs


def count_tokens(name: str) -> float:
    """Tokens of a step by the number of GPUs."""
    settings = RUNS[name].settings
    rows = settings["train"]["global_batch_size"] / (settings["devices"] * settings.get("num_nodes", 1))
    return rows * settings["train"]["max_seq_length"]
