"""Checkpoints taken under one layout load under every other, equal to the bit."""

from pathlib import Path

import pytest
import torch

from litgpt.store.checkpoint_load import load_checkpoint
from litgpt.store.checkpoint_save import Checkpoints
from litgpt.store.save_model import save_model_folder
from tests.processes import join_ranks, start_ranks
from tests.store.layout_worker import (
    LAYOUTS,
    OPTIMIZERS,
    assert_same,
    build,
    check_layouts,
    check_model_folders,
    train,
    whole_state,
)
from tests.store.models import assert_loads, random_model, small, weights


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_every_layout_loads_under_every_other(tmp_path: Path, ranks: int) -> None:
    model, optimizer = build("plain", 1)
    train(model, optimizer)
    alone = Checkpoints(tmp_path / "one")
    alone.save(1, model, optimizer, {"tokens": 12345678901})
    alone.commit()

    codes = join_ranks(start_ranks(check_layouts, tmp_path, folder=tmp_path, ranks=ranks))
    assert codes == [0] * ranks, [(tmp_path / f"rank-{rank}.log").read_text() for rank in range(ranks)]

    saved = sorted(tmp_path.glob("*-*/step-00000008"))
    assert len(saved) == len(LAYOUTS[ranks]) * len(OPTIMIZERS[ranks])
    for folder in saved:
        kind = folder.parent.name.split("-")[1]
        states = []
        for seed in (2, 3):
            model, optimizer = build("plain", seed, kind)
            load_checkpoint(folder, model, optimizer, warn=lambda _line: None)
            states.append(whole_state(model, optimizer))
        assert_same(*states, what=str(folder))
        expected, trained = build("plain", 1, kind)
        train(expected, trained)
        for name, tensor in whole_state(expected, trained).items():
            # the ranks averaged equal gradients, which may round otherwise
            assert torch.allclose(tensor.float(), states[0][name].float(), atol=1e-6), name


@pytest.mark.parametrize("name", ["pythia-14m", "Gemma-2b"])
def test_a_model_folder_fills_a_sharded_model_and_is_written_from_one(tmp_path: Path, name: str) -> None:
    model = random_model(small(name))
    save_model_folder(tmp_path / "model", config=model.config, tensors=weights(model))
    codes = join_ranks(start_ranks(check_model_folders, tmp_path, folder=tmp_path, ranks=2))
    assert codes == [0, 0], [(tmp_path / f"rank-{rank}.log").read_text() for rank in range(2)]
    assert_loads(tmp_path / "again", model)
