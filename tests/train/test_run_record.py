"""The record of a run: its facts, and why each start of it ended."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from litgpt.errors import UserError
from litgpt.recipe.pretrain import Pretrain
from litgpt.recipe.to_yaml import find_changes
from litgpt.recipe.train import TrainArgs
from litgpt.train import run_record
from tests.processes import join_ranks, run_litgpt, start_ranks
from tests.runs import write_recipe, write_text


def test_the_record_has_the_facts_of_a_run(tmp_path: Path) -> None:
    write_text(tmp_path)
    write_recipe(tmp_path, train__max_steps=2, eval__sample_prompt="word1", eval__sample_tokens=2)
    codes = join_ranks(start_ranks(run_litgpt, "pretrain", "--config", "recipe.yaml", folder=tmp_path))
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    (start,) = record["starts"]
    assert codes == [0] and start["end"]["step"] == 2
    assert start["end"]["reason"] == "train.max_steps: all 2 steps are done"
    assert start["versions"]["torch"] == torch.__version__ and start["precision"] == "32-true" and start["host"]
    assert record["model"]["name"] == "toy"
    assert record["model"]["parameters"] == record["model"]["trained_parameters"] > 10_000
    assert record["data"]["source"] == "TextFiles" and record["data"]["settings"]["train_data_path"] == "text"
    assert record["data"]["samples"] > 10 and record["data"]["sequence_length"] == 32
    assert record["data"]["tokens"] == 32 * record["data"]["samples"] and record["weights"] is None
    assert record["changes"]["train"]["max_steps"] == 2 and "num_nodes" not in record["changes"]
    page = (tmp_path / "out" / "report.html").read_text()
    assert "all 2 steps are done" in page and start["host"] in page


def test_a_resumed_run_has_a_start_more_and_a_failure_is_the_reason_of_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_record, "describe_run", lambda _: {})
    monkeypatch.setattr(run_record, "describe_start", lambda _, step: {"step": step})
    loop = SimpleNamespace(step=0, reason="SIGINT received")
    run: Any = SimpleNamespace(recipe=SimpleNamespace(out_dir=tmp_path), progress={})
    with run_record.record_run(run, loop):  # type: ignore[arg-type]
        loop.step = 4
        (started,) = json.loads((tmp_path / "run.json").read_text())["starts"]
        assert "end" not in started  # as after a kill
    run.progress = {"step": 4}
    for error in (UserError("guard.max_skipped: 2 steps"), KeyboardInterrupt()):
        with pytest.raises(type(error)), run_record.record_run(run, loop):  # type: ignore[arg-type]
            raise error
    starts = json.loads((tmp_path / "run.json").read_text())["starts"]
    assert [(start["step"], start["end"]["reason"]) for start in starts] == [
        (0, "SIGINT received"),
        (4, "guard.max_skipped: 2 steps"),
        (4, "KeyboardInterrupt"),
    ]


def test_changes_leave_out_defaults_but_not_what_has_none() -> None:
    recipe = Pretrain("toy", train=TrainArgs(global_batch_size=512, lr_warmup_steps=5, max_norm=1.0, max_steps=7))
    changes = find_changes(recipe)
    assert changes["model_name"] == "toy" and changes["train"]["lr_warmup_steps"] == 5
    assert "global_batch_size" not in changes["train"] and "optimizer" not in changes
