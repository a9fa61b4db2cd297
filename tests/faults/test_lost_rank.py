"""A rank that is killed or frozen in the middle of a run: the others name it and stop; torchrun starts all again."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.faults.test_killed_training import prepare, run_uninterrupted
from tests.processes import find_free_port, join_ranks, run_litgpt, start_ranks
from tests.runs import read_losses

GONE = re.compile(r"litgpt: error: (.*) is gone; the others stop; start again with resume: auto")
ENDLESS = {"train__max_steps": 10**6, "train__save_interval": None, "parallel": {"timeout_minutes": 0.25}}


def wait_for(text: str, log: Path, seconds: float = 200) -> None:
    until = time.monotonic() + seconds
    while not log.is_file() or text not in log.read_text():
        assert time.monotonic() < until, log.read_text()
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("lost", "number"),
    [
        pytest.param(1, signal.SIGKILL, id="second"),
        pytest.param(0, signal.SIGKILL, id="first"),
        pytest.param(1, signal.SIGSTOP, id="frozen", marks=pytest.mark.slow),
    ],
)
def test_the_rank_that_is_gone_is_named_and_the_others_stop(tmp_path: Path, lost: int, number: signal.Signals) -> None:
    processes = start_ranks(
        run_litgpt, "pretrain", "--config", "recipe.yaml", folder=prepare(tmp_path, 2, **ENDLESS), ranks=2
    )
    wait_for("step 3/", tmp_path / "rank-0.log")
    victim, left = processes[lost], processes[1 - lost]
    assert victim.pid is not None
    os.kill(victim.pid, number)
    assert join_ranks([left], timeout=60) == [1]
    victim.kill()
    join_ranks([victim])
    text = (tmp_path / f"rank-{1 - lost}.log").read_text()
    (message,) = GONE.findall(text)
    assert message.startswith(f"rank {lost} of 2")
    assert lost == 0 or f"(process {victim.pid} on " in message
    assert "Traceback" not in text


def children(process: int) -> list[int]:
    listed = Path(f"/proc/{process}/task/{process}/children")
    return [int(child) for child in listed.read_text().split()] if listed.exists() else []


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_torchrun_starts_all_ranks_again_and_the_run_goes_on(tmp_path: Path) -> None:
    message = run_uninterrupted(tmp_path / "unbroken", 2)
    folder = prepare(tmp_path / "elastic", 2)
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "1"]
    meet = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{find_free_port()}"]
    command = [*run, *meet, "-m", "litgpt", "pretrain", "--config", "recipe.yaml"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    with (folder / "log").open("w") as log:
        agent = subprocess.Popen(
            [*command, "--resume", "auto"], cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT
        )
        try:
            wait_for("step 4/12", folder / "log")
            os.kill(children(agent.pid)[1], signal.SIGKILL)
            assert agent.wait(200) == 0, (folder / "log").read_text()
        finally:
            for process in [*children(agent.pid), agent.pid]:
                if agent.poll() is None:
                    os.kill(process, signal.SIGKILL)
    text = (folder / "log").read_text()
    assert len(GONE.findall(text)) <= 1
    assert "Resuming training from" in text
    assert read_losses(folder) == message
