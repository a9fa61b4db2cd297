"""Checkpoints taken under one layout load under every other, equal to the bit."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from layout_worker import LAYOUTS, OPTIMIZERS, assert_same, build, train, whole_state

from litgpt.store.checkpoint import Checkpoints, load

WORKER = Path(__file__).with_name("layout_worker.py")


def run_ranks(ranks: int, folder: Path) -> None:
    workers = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(rank), str(ranks), str(folder)], stderr=subprocess.PIPE, text=True
        )
        for rank in range(ranks)
    ]
    for worker in workers:
        _, errors = worker.communicate(timeout=120)
        assert worker.returncode == 0, errors


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_every_layout_loads_under_every_other(tmp_path: Path, ranks: int) -> None:
    model, optimizer = build("plain", 1)
    train(model, optimizer)
    alone = Checkpoints(tmp_path / "one")
    alone.save(1, model, optimizer, {"tokens": 12345678901})
    alone.finish()

    run_ranks(ranks, tmp_path)

    saved = sorted(tmp_path.glob("*-*/step-00000008"))
    assert len(saved) == len(LAYOUTS[ranks]) * len(OPTIMIZERS[ranks])
    for folder in saved:
        kind = folder.parent.name.split("-")[1]
        states = []
        for seed in (2, 3):
            model, optimizer = build("plain", seed, kind)
            load(folder, model, optimizer, warn=lambda line: None)
            states.append(whole_state(model, optimizer))
        assert_same(*states, what=str(folder))
        expected, trained = build("plain", 1, kind)
        train(expected, trained)
        for name, tensor in whole_state(expected, trained).items():
            # the ranks averaged equal gradients, which may round otherwise
            assert torch.allclose(tensor.float(), states[0][name].float(), atol=1e-6), name
