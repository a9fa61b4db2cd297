"""Runs with products in FP8: they learn as in bf16, and delayed scales go on from a checkpoint to the bit."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.processes import join_ranks, run_litgpt, start_ranks
from tests.runs import SHAPE, read_losses, write_recipe, write_text

pytest.importorskip("torchao")
WIDE = {**SHAPE, "n_embd": 32, "intermediate_size": 48}


def run(folder: Path, *, timeout: float = 120, **changes: Any) -> dict[int, float]:
    """The losses of a run that must end well."""
    folder.mkdir(parents=True, exist_ok=True)
    write_recipe(folder, precision="bf16-mixed", **{"model_config": WIDE, "train__save_interval": None, **changes})
    codes = join_ranks(start_ranks(run_litgpt, "pretrain", "--config", "recipe.yaml", folder=folder), timeout=timeout)
    assert codes == [0], (folder / "rank-0.log").read_text()
    return read_losses(folder)


def test_delayed_scales_are_resumed_to_the_bit(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    write_text(first)
    shutil.copytree(first / "text", second / "text")
    changes = {"fp8": {"recipe": "delayed", "amax_history_len": 3}, "train__max_steps": 5, "train__save_interval": 3}
    straight = run(first, **changes)
    text = " ".join((first / "rank-0.log").read_text().split())
    assert "fp8.recipe: delayed is emulated" in text and text.count("emulated") == 1
    (folder,) = first.glob("out/step-00000003")
    assert (folder / "fp8_amax_history.json").is_file()
    resumed = run(second, **changes, resume=str(folder))
    assert resumed == {step: loss for step, loss in straight.items() if step > 3}


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_losses_after_200_steps_are_those_of_bf16(tmp_path: Path, python_docs: Path) -> None:
    shape = {"n_layer": 2, "n_embd": 128, "n_head": 4, "intermediate_size": 256, "padded_vocab_size": 320}
    losses = {}
    for name in (None, "tensorwise", "rowwise", "blockwise", "mxfp8", "delayed"):
        logged = run(
            tmp_path / str(name),
            timeout=900,
            model_config={**SHAPE, **shape, "block_size": 64},
            data={"class_path": "PythonDocs", "init_args": {"data_path": str(python_docs)}},
            train__max_steps=200,
            train__micro_batch_size=8,
            optimizer={"class_path": "AdamW", "init_args": {"lr": 3e-3}},
            **({} if name is None else {"fp8": {"recipe": name}}),
        )
        losses[name] = sum(logged[step] for step in range(181, 201)) / 20
    print(losses)
    assert {name: loss for name, loss in losses.items() if abs(loss - losses[None]) > 0.05} == {}
