"""Whole runs from the command line, each with another setting: they end well and learn."""

from pathlib import Path
from typing import Any

import pytest

from tests.processes import finish, litgpt, start
from tests.runs import losses, write_recipe, write_text

SETTINGS: dict[str, dict[str, Any]] = {
    "bf16-mixed": {"precision": "bf16-mixed"},
    "bf16-true": {"precision": "bf16-true"},
    "16-mixed": {"precision": "16-mixed"},
    "plain loss": {"loss": {"impl": "plain"}},
    "document mask": {"data__init_args__document_mask": True},
    "muon": {"optimizer": {"class_path": "Muon", "init_args": {"lr": 1e-2}}},
    "sgd": {"optimizer": {"class_path": "SGD", "init_args": {"lr": 0.5, "momentum": 0.9}}},
    "torch class": {"optimizer": {"class_path": "torch.optim.Adagrad", "init_args": {"lr": 3e-2}}},
    "tied": {"train__tie_embeddings": True},
    "wsd": {"train__lr_decay_style": "wsd", "train__wsd_decay_steps": 4},
    "epochs": {"train__max_steps": None, "train__epochs": 1},
}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "ddp": (2, {"parallel": {"data_replicate": 2}}),
    "fsdp": (2, {"parallel": {"data_shard": 2}}),
    "fsdp in bf16": (2, {"parallel": {"data_shard": 2, "reshard_after_forward": False}, "precision": "bf16-mixed"}),
    "fsdp in fp16 with muon": (
        2,
        {"precision": "16-mixed", "optimizer": {"class_path": "Muon", "init_args": {"lr": 1e-2}}},
    ),
    "hsdp": (4, {"parallel": {"data_replicate": 2, "data_shard": 2}}),
}


def trained(folder: Path, ranks: int = 1, **changes: Any) -> dict[int, float]:
    """The losses of a run that must end well."""
    write_text(folder)
    write_recipe(folder, devices=ranks, **{"eval__sample_prompt": "word1", "eval__sample_tokens": 4, **changes})
    codes = finish(start(litgpt, "pretrain", "--config", "recipe.yaml", folder=folder, ranks=ranks))
    assert codes == [0] * ranks, "".join(path.read_text() for path in sorted(folder.glob("rank-*.log")))
    return losses(folder)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_run_with_this_setting_learns(name: str, tmp_path: Path) -> None:
    got = trained(tmp_path, **SETTINGS[name])
    assert got[max(got)] < got[1] - 0.3


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_run_laid_out_so_learns(name: str, tmp_path: Path) -> None:
    ranks, changes = LAYOUTS[name]
    got = trained(tmp_path, ranks, **changes)
    assert got[max(got)] < got[1] - 0.3


def test_layouts_have_the_losses_of_one_process(tmp_path: Path) -> None:
    alone = trained(tmp_path / "alone")
    for name, (ranks, changes) in {"ddp": LAYOUTS["ddp"], "fsdp": LAYOUTS["fsdp"]}.items():
        assert trained(tmp_path / name, ranks, **changes) == pytest.approx(alone, abs=1e-5)


def test_training_goes_on_from_a_finished_model(tmp_path: Path) -> None:
    first = trained(tmp_path / "first")
    final = tmp_path / "first" / "out" / "final"
    second = trained(tmp_path / "second", initial_checkpoint_dir=str(final), optimizer__init_args__lr=1e-3)
    assert second[1] < first[1] - 0.3
    assert second[1] == pytest.approx(first[12], abs=0.3)


def test_a_second_run_into_the_same_folder_is_refused(tmp_path: Path) -> None:
    trained(tmp_path)
    before = losses(tmp_path)
    assert finish(start(litgpt, "pretrain", "--config", "recipe.yaml", folder=tmp_path)) == [1]
    assert "holds a run already" in (tmp_path / "rank-0.log").read_text()
    assert losses(tmp_path) == before


def test_the_time_limit_saves_publishes_and_says_so(tmp_path: Path) -> None:
    got = trained(tmp_path, train__max_steps=None, train__max_time=0.5)
    assert got
    assert "train.max_time: 0.5 s have passed" in (tmp_path / "rank-0.log").read_text()
    assert (tmp_path / "out" / "final" / "model.safetensors").is_file()


def test_tokens_that_the_model_has_no_row_for_are_refused_in_one_line(tmp_path: Path) -> None:
    write_text(tmp_path)
    write_recipe(tmp_path, model_config__padded_vocab_size=64)
    assert finish(start(litgpt, "pretrain", "--config", "recipe.yaml", folder=tmp_path)) == [1]
    assert "258 tokens, but the model has 64 rows" in (tmp_path / "rank-0.log").read_text()


@pytest.mark.slow
def test_a_compiled_run_has_the_losses_of_an_eager_one(tmp_path: Path) -> None:
    eager = trained(tmp_path / "eager")
    assert trained(tmp_path / "compiled", compile=True) == pytest.approx(eager, abs=1e-4)
