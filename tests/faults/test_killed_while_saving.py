"""SIGKILL at random instants of a run that saves at every step: there is always a loadable latest checkpoint."""

import random
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from litgpt.store.checkpoint_load import find_latest, load_checkpoint
from litgpt.store.checkpoint_save import Checkpoints
from tests.faults.saving_worker import WIDTH, save_forever
from tests.processes import CONTEXT, start_ranks


def run_and_kill(folder: Path, ranks: int, attempt: int, seconds: float) -> int:
    """Start a run, kill one rank after a while and then the rest; returns the last step that it sent, 0 if none."""
    receiver, sender = CONTEXT.Pipe(duplex=False)
    workers = start_ranks(save_forever, folder, ranks, sender, folder=folder.parent, ranks=ranks)
    sender.close()
    if attempt % 2 == 0:
        receiver.poll(100)  # else it may be killed before its first save
    time.sleep(seconds)
    workers[attempt % ranks].kill()
    for worker in workers:
        worker.kill()  # the others wait for the killed rank
        worker.join()
    step = 0
    try:
        while receiver.poll():
            step = receiver.recv()
    except EOFError:
        return step
    return step


@pytest.mark.parametrize(
    ("ranks", "kills"),
    [(1, 10), (2, 4), pytest.param(1, 200, marks=pytest.mark.slow), pytest.param(2, 50, marks=pytest.mark.slow)],
)
def test_there_is_always_a_loadable_latest(tmp_path: Path, ranks: int, kills: int) -> None:
    folder = tmp_path / "out"
    half_done = last = 0
    for attempt in range(kills):
        last = run_and_kill(folder, ranks, attempt, random.uniform(0, 0.1) * ranks) or last
        half_done += len(list(folder.glob("step-*.partial")))
        messages: list[str] = []
        latest = find_latest(folder, messages.append)
        assert not messages, messages
        assert latest is not None
        model = nn.Linear(WIDTH, WIDTH)
        step = load_checkpoint(latest, model, warn=lambda _line: None)["value"]
        assert step in (last, last + 1), "a step that was sent is saved"
        assert all(torch.all(parameter == step) for parameter in model.parameters())
        last = step
    checkpoints = Checkpoints(folder, keep=2, warn=lambda _line: None)
    checkpoints.save(last + 1, nn.Linear(2, 2), None, {})
    checkpoints.commit()
    assert len(list(folder.iterdir())) == 2, "a save that ends leaves two checkpoints and nothing else"
    print(f"{kills} kills, {half_done} of them inside a save, {last} steps")
