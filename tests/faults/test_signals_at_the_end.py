"""Signals that arrive when training has ended, while the final model is written or the process exits, lose nothing."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.processes import join_ranks, start_ranks
from tests.runs import write_recipe, write_text

NUMBERS = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]


def prepare(folder: Path) -> Path:
    write_text(folder)
    write_recipe(folder, train__max_steps=2)
    return folder


def train_with_signals() -> int:
    """Train, and send signals before the report is written, before the summary is printed, and at the end."""
    from litgpt import cli, interrupts
    from litgpt.train import run

    def precede(work: Any, *numbers: int) -> Any:
        def send_and_work(*arguments: Any) -> Any:
            for number in numbers:
                os.kill(os.getpid(), number)
            return work(*arguments)

        return send_and_work

    run.write_report = precede(run.write_report, signal.SIGTERM, signal.SIGTERM)
    run.render_summary = precede(run.render_summary, signal.SIGINT, *NUMBERS)
    interrupts.is_program.set()
    return precede(cli.main(["pretrain", "--config", "recipe.yaml"]).__index__, *NUMBERS)()


def check_end(folder: Path, log: str) -> None:
    assert log.count("Training ended") == 1 and "interrupted" not in log and "Traceback" not in log, log
    assert (folder / "out" / "final" / "model.safetensors").is_file() and (folder / "out" / "report.html").is_file()
    (start,) = json.loads((folder / "out" / "run.json").read_text())["starts"]
    assert start["end"]["reason"] == "train.max_steps: all 2 steps are done"


def test_signals_after_the_last_step_do_not_end_the_run_early(tmp_path: Path) -> None:
    folder = prepare(tmp_path)
    (code,) = join_ranks(start_ranks(train_with_signals, folder=folder))
    log = (folder / "rank-0.log").read_text()
    assert code == 0, log
    assert log.count("SIGTERM: finishing the final model, then ending; SIGINT stops at once") == 1
    check_end(folder, log)


@pytest.mark.slow
@pytest.mark.parametrize("number", NUMBERS)
def test_signals_until_the_process_has_exited_leave_its_code(tmp_path: Path, number: signal.Signals) -> None:
    folder = prepare(tmp_path)
    line = [sys.executable, "-m", "litgpt", "pretrain", "--config", "recipe.yaml"]
    with (folder / "log").open("w") as output:
        process = subprocess.Popen(
            line,
            cwd=folder,
            stdout=output,
            stderr=output,
            env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
        )
    while "Training ended" not in (folder / "log").read_text() and process.poll() is None:
        time.sleep(0.001)
    while process.poll() is None:
        process.send_signal(number)
        time.sleep(0.001)
    log = (folder / "log").read_text()
    assert process.returncode == 0, log
    check_end(folder, log)
