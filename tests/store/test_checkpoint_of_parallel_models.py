"""Checkpoints of any layout load under any other, to the bit, and training continues; each value is written once."""

import json
from math import prod
from pathlib import Path

import pytest
import torch

from litgpt.store.checkpoint_load import open_checkpoint
from litgpt.store.load_model import iter_tensors
from litgpt.store.published_tensor import list_parameters
from litgpt.store.save_model import save_model_folder
from tests.layouts.pool import POOL
from tests.store.models import assert_loads, random_model, weights
from tests.store.parallel_models_worker import LAYOUTS, SHAPE, fill_and_write, resume, save


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[float]]]:
    """A folder with a checkpoint of every layout, and the losses that followed."""
    folder = tmp_path_factory.mktemp("saved")
    losses = {}
    for layout, (ranks, _) in LAYOUTS.items():
        results = POOL.run(save, layout, folder, ranks=ranks)
        assert all(value == results[0] for value in results)
        losses[layout] = results[0]
    return folder, losses


SLOW = ("hsdp", "tensor", "stages", "experts")  # four ranks; the others read what these have saved


@pytest.mark.parametrize(
    "layout", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in LAYOUTS]
)
def test_every_layout_goes_on_from_every_other(layout: str, saved: tuple[Path, dict[str, list[float]]]) -> None:
    ranks, _ = LAYOUTS[layout]
    messages = [line for results in POOL.run(resume, layout, *saved, ranks=ranks) for line in results]
    others = [name for name in LAYOUTS if name != layout]
    assert [line for line in messages if "random generators are not restored" not in line] == []
    assert len(messages) == len(others)
    alike = [name for name in others if LAYOUTS[name][0] == ranks]
    assert sum("in another layout" in line for line in messages) == len(alike)


def test_every_value_is_written_once_and_by_all_ranks(saved: tuple[Path, dict[str, list[float]]]) -> None:
    folder, _ = saved
    names = list_parameters(SHAPE)
    assert SHAPE.tie_embeddings
    for layout, (ranks, _) in LAYOUTS.items():
        step = folder / layout / "step-00000002"
        files = open_checkpoint(step)
        assert {name.removeprefix("model.") for name in files.tensors if name.startswith("model.")} == set(names)
        sizes = [path.stat().st_size for path in step.glob("shard-*")]
        assert len(sizes) == ranks
        assert ranks == 1 or max(sizes) < 0.55 * sum(sizes)
        for name, whole in files.tensors.items():
            assert sum(prod(block.shape) for block in whole.blocks) == prod(whole.shape), name
        groups = json.loads((step / "progress.json").read_text())["groups"]
        assert [group["settings"]["weight_decay"] for group in groups] == [0.1, 0.0]
        assert sorted(name for group in groups for name in group["parameters"]) == sorted(names)


def test_a_model_folder_fills_every_layout_and_is_written_whole_by_it(tmp_path: Path) -> None:
    model = random_model(SHAPE)
    save_model_folder(tmp_path / "model", config=SHAPE, tensors=weights(model))
    folders = {}
    for layout, (ranks, _) in LAYOUTS.items():
        POOL.run(fill_and_write, layout, tmp_path, ranks=ranks)
        assert_loads(tmp_path / layout, model)
        added = torch.load(tmp_path / f"{layout}.pt", weights_only=True)
        merged = dict(iter_tensors(tmp_path / f"{layout} merged", SHAPE))
        folders[layout] = {**added, **merged}
    for layout, tensors in folders.items():
        assert tensors.keys() == folders["one"].keys()
        for name, tensor in tensors.items():
            assert torch.equal(tensor, folders["one"][name]), (layout, name)
    changed = [name for name in weights(model) if not torch.equal(folders["one"][name], weights(model)[name])]
    assert len(changed) == 2 * 3  # q and both kinds of down in every block
