"""The best checkpoint by a metric is kept, and training stops when the metric no longer improves."""

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from litgpt.errors import UserError
from litgpt.recipe.train import BestArgs
from litgpt.train.best_metric import BestMetric
from tests.commands.test_finetune import recipe_of, write_base, write_rows
from tests.processes import join_ranks, run_litgpt, start_ranks
from tests.runs import read_losses, write_recipe, write_text


def record(best: BestMetric, values: list[float], name: str = "val_loss") -> list[bool]:
    return [best.record(step, {name: value}) for step, value in enumerate(values)]


@pytest.mark.parametrize(
    ("mode", "values", "expected"),
    [
        ("min", [3.0, 2.0, 2.0, 2.5, 1.0], (4, 1.0, 0)),
        ("max", [3.0, 2.0, 3.0, 2.5, 1.0], (0, 3.0, 4)),
        ("min", [math.nan, 2.0, math.nan, -math.inf], (1, 2.0, 2)),
        ("max", [math.inf, math.nan], (None, None, 2)),
    ],
)
def test_the_best_value_is_finite_and_better_than_all_before(mode: Any, values: list[float], expected: tuple) -> None:
    best = BestMetric(BestArgs(mode=mode))
    is_best = record(best, values)
    assert (best.step, best.value, best.evaluations_since) == expected
    assert sum(is_best) == 0 if expected[0] is None else is_best[expected[0]]


def test_patience_counts_the_evaluations_since_the_best_one_also_after_a_restart() -> None:
    values, best = [3.0, 2.0, 2.5, math.nan, 1.5, 1.6, 1.7, 1.8], BestMetric(BestArgs(), patience=3)
    for step, value in enumerate(values):
        assert not best.is_exhausted
        resumed = BestMetric(BestArgs(), patience=3)
        resumed.load_state_dict(json.loads(json.dumps(best.state_dict())))
        best = resumed
        best.record(step, {"val_loss": value})
    assert best.is_exhausted
    assert best.get_stop_reason() == (
        "train.patience: 3 evaluations without a better one; the best is val_loss 1.5000 at step 4"
    )


def test_without_settings_nothing_is_recorded() -> None:
    best = BestMetric(None)
    assert record(best, [2.0, 1.0]) == [False, False]
    assert best.state_dict() is None and best.describe() is None and not best.is_exhausted


@pytest.mark.parametrize("changed", [BestArgs(metric="val_ppl"), BestArgs(mode="max"), None])
def test_the_best_of_another_metric_is_forgotten(changed: BestArgs | None) -> None:
    before, after = BestMetric(BestArgs()), BestMetric(changed)
    record(before, [2.0])
    after.load_state_dict(before.state_dict())
    assert after.value is None


def test_a_metric_that_an_evaluation_does_not_have_is_refused_with_those_that_it_has() -> None:
    best = BestMetric(BestArgs("val_rewards/accuracies", "max"))
    with pytest.raises(UserError, match="val_rewards/accuracies is not a metric of this run; use val_loss or val_ppl"):
        best.record(4, {"val_loss": 1.0, "val_ppl": 2.7})


BEST: dict[str, Any] = {
    "checkpoint": {"best": {"metric": "val_loss"}, "keep": 1},
    "eval__interval": 3,
    "train__save_interval": 7,
    "train__log_interval": 7,
    "train__patience": 2,
    "train__max_steps": 40,
    "train__lr_warmup_steps": 40,  # the loss falls while the learning rate is low, and then rises
    "train__lr_decay_style": "constant",
    "train__min_lr": None,
    "optimizer__init_args__lr": 2.0,
}


def train(folder: Path, *flags: str, code: int = 0, ranks: int = 1, **changes: Any) -> str:
    """The output of a run of the recipe above."""
    write_text(folder)
    write_recipe(folder, devices=ranks, **{**BEST, **changes})
    processes = start_ranks(run_litgpt, "pretrain", "--config", "recipe.yaml", *flags, folder=folder, ranks=ranks)
    assert join_ranks(processes) == [code] * ranks, (folder / "rank-0.log").read_text()
    return " ".join((folder / "rank-0.log").read_text().replace("│", " ").split())


def read_validation(folder: Path) -> dict[int, float]:
    with (folder / "out/logs/csv/version_0/metrics.csv").open() as file:
        return {int(row["step"]): float(row["val_loss"]) for row in csv.DictReader(file) if row["val_loss"]}


def read_best(folder: Path) -> dict[str, Any]:
    (latest,) = sorted((folder / "out").glob("step-*"))[-1:]
    state = json.loads((latest / "progress.json").read_text())["best"]
    assert isinstance(state, dict)
    return state


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run whose patience ended, and its output."""
    folder = tmp_path_factory.mktemp("stopped")
    return folder, train(folder)


def test_a_run_stops_early_and_keeps_the_best_checkpoint(stopped: tuple[Path, str]) -> None:
    folder, output = stopped
    losses = read_validation(folder)
    best, last = min(losses, key=lambda step: losses[step]), max(losses)
    assert last == best + 6 and best % 7, "the best is between two checkpoints of save_interval"
    assert {path.name for path in (folder / "out").glob("step-*")} == {f"step-{best:08d}", f"step-{last:08d}"}
    summary = f"Best val_loss {losses[best]:.4f} at step {best}: out/step-{best:08d}"
    assert "train.patience: 2 evaluations without a better one" in output and summary in output
    expected = {"metric": "val_loss", "mode": "min", "step": best, "value": pytest.approx(losses[best])}
    assert read_best(folder) == {**expected, "evaluations_since": 2}
    assert last in read_losses(folder), "the last step is logged"
    report = (folder / "out/report.html").read_text()
    assert f"the best checkpoint: val_loss {losses[best]:.4f} at step {best}" in report


def test_final_holds_the_last_weights(stopped: tuple[Path, str]) -> None:
    folder, _ = stopped
    best, last = sorted((folder / "out").glob("step-*"))
    final = load_file(folder / "out/final/model.safetensors")["model.embed_tokens.weight"]
    at_best, at_last = (load_file(path / "shard-00000-of-00001.safetensors") for path in (best, last))
    assert torch.equal(at_last["model.embedding.weight"], final)
    assert not torch.equal(at_best["model.embedding.weight"], final)


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_resumed_run_stops_where_an_uninterrupted_one_does(
    stopped: tuple[Path, str], tmp_path: Path, ranks: int
) -> None:
    whole, broken = stopped[0] if ranks == 1 else tmp_path / "whole", tmp_path / "broken"
    if ranks > 1:
        train(whole, ranks=ranks)
    train(broken, ranks=ranks, train__patience=1)
    assert read_best(broken)["evaluations_since"] == 1
    train(broken, "--resume", "auto", ranks=ranks)
    assert read_validation(broken) == read_validation(whole) and read_best(broken) == read_best(whole)
    names = [{path.name for path in (folder / "out").glob("step-*")} for folder in (broken, whole)]
    assert names[0] == names[1]
    again = train(broken, "--resume", "auto", ranks=ranks)
    assert "train.patience: 2 evaluations" in again and "(0 in this run)" in again


def test_the_initial_weights_may_be_the_best(tmp_path: Path) -> None:
    worse = {"optimizer__init_args__lr": 9.0, "train__lr_warmup_steps": 1, "eval__initial_validation": True}
    output = train(tmp_path, **worse, eval__interval=1)
    assert "at step 0: out/step-00000000" in output and read_best(tmp_path)["step"] == 0
    losses = read_validation(tmp_path)
    train(tmp_path, "--resume", "out/step-00000000", **worse, eval__interval=1)
    assert read_validation(tmp_path) == losses and read_best(tmp_path)["evaluations_since"] == 2


def test_the_best_step_is_saved_without_a_save_interval_and_counts_the_last_evaluation(tmp_path: Path) -> None:
    output = train(tmp_path, train__save_interval=None, train__max_steps=5, train__patience=None, eval__interval=100)
    assert read_best(tmp_path)["step"] == 5 and "at step 5: out/step-00000005" in output


def test_an_unknown_metric_and_missing_validation_data_are_refused(tmp_path: Path) -> None:
    output = train(tmp_path, code=1, checkpoint={"best": {"metric": "val_accuracy", "mode": "max"}})
    assert "checkpoint.best.metric: val_accuracy is not a metric of this run; use val_loss or val_ppl" in output
    base = write_base(tmp_path)
    write_rows(tmp_path)
    recipe_of(tmp_path, base, checkpoint={"best": {"metric": "val_loss"}}, data__init_args__val_split_fraction=0.0)
    assert join_ranks(start_ranks(run_litgpt, "finetune_full", "--config", "recipe.yaml", folder=tmp_path)) == [1]
    message = "checkpoint.best.metric: val_loss needs validation data; add some, or set checkpoint.best: null"
    assert message in (tmp_path / "rank-0.log").read_text()
