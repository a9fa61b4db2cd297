"""A rank that hangs in a step: the stacks of all ranks show where, and the error that ends the run names them."""

import os
import time
from pathlib import Path
from typing import Any

import pytest

from litgpt.train import loop
from tests.faults.test_killed_training import prepare, read_log
from tests.processes import join_ranks, run_litgpt, start_ranks

SETTINGS = {"train__save_interval": None, "parallel": {"timeout_minutes": 0.15}}


def hang_here() -> None:
    while True:
        time.sleep(0.1)


def train_and_hang(*argv: str) -> int:
    """Run a command line whose second rank hangs in step 3."""
    real = loop.train_step

    def train_step(*arguments: Any, **settings: Any) -> Any:
        train_step.calls += 1  # type: ignore[attr-defined]
        if train_step.calls == 3 and os.environ["RANK"] == "1":  # type: ignore[attr-defined]
            hang_here()
        return real(*arguments, **settings)

    train_step.calls = 0  # type: ignore[attr-defined]
    loop.train_step = train_step  # type: ignore[assignment]
    return run_litgpt(*argv)


@pytest.mark.slow
def test_a_rank_that_hangs_leaves_the_stacks_of_all(tmp_path: Path) -> None:
    folder = prepare(tmp_path, 2, **SETTINGS)
    processes = start_ranks(train_and_hang, "pretrain", "--config", "recipe.yaml", folder=folder, ranks=2)
    assert join_ranks(processes, timeout=60) == [1, 1], read_log(folder)
    hung = (folder / "out" / "stacks" / "rank-00001.txt").read_text()
    assert "in hang_here" in hung and "in train_step" in hung
    waiting = (folder / "out" / "stacks" / "rank-00000.txt").read_text()
    assert "in hang_here" not in waiting and "step.py" in waiting, "waits in a collective of the same step"
    cause = (
        "step 3 has taken longer than parallel.timeout_minutes: 0.15; the Python stacks of all ranks are in out/stacks"
    )
    for rank in range(2):
        log = (folder / f"rank-{rank}.log").read_text()
        errors = [line for line in log.splitlines() if line.startswith("litgpt: error: ")]
        assert errors == [f"litgpt: error: {cause}; start again with resume: auto"], log
        assert "Traceback" not in log
