"""Tasks of lm-eval at the evaluations of training: their scores are logged, and training does not change by them."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from litgpt.cli import main
from litgpt.errors import UserError
from litgpt.recipe.parallel import ParallelArgs
from litgpt.recipe.pretrain import Pretrain
from litgpt.recipe.train import EvalArgs
from tests.runs import read_losses, write_recipe, write_text

CHOICES = {
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "choices",
    "doc_to_target": "gold",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}
WRITES = {
    "output_type": "generate_until",
    "doc_to_text": "{{question}}",
    "doc_to_target": "word1",
    "generation_kwargs": {"until": [" "], "max_gen_toks": 4, "do_sample": True},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = [{"question": f"word{n}", "choices": [" word1", " other"], "gold": n % 2} for n in range(4)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}}}
    for name, task in {"choices": CHOICES, "writes": WRITES}.items():
        (folder / f"{name}.yaml").write_text(json.dumps({"task": name, **source, "test_split": "test", **task}))
    return folder


@pytest.mark.slow
def test_scores_are_logged_and_training_stays_as_it_is(
    tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    losses: list[dict[int, float]] = []
    settings: dict[str, Any] = {"eval__interval": 2, "train__max_steps": 4, "model_config__dropout": 0.2}
    given = {"eval__tasks": ["choices", "writes"], "eval__task_path": str(tasks), "eval__task_limit": 2}
    for name, changes in {"plain": {}, "scored": given}.items():
        folder = tmp_path / name
        write_text(folder)
        monkeypatch.chdir(folder)
        assert main(["pretrain", "--config", str(write_recipe(folder, **settings, **changes))]) == 0
        losses.append(read_losses(folder))
    assert losses[0] == losses[1]
    with next(folder.glob("out/logs/csv/version_0/metrics.csv")).open() as file:
        rows = [row for row in csv.DictReader(file) if row.get("tasks/choices/acc")]
    assert [int(float(row["step"])) for row in rows] == [2, 4] and all(row["val_loss"] for row in rows)
    assert {row["tasks/choices/acc"] for row in rows} <= {"0.0", "0.5", "1.0"}
    assert all(float(row["tasks/writes/exact_match"]) >= 0 for row in rows)
    assert "choices/acc 0." in capsys.readouterr().out.replace("acc 1.", "acc 0.")
    page = (folder / "out" / "report.html").read_text()
    assert "choices/acc" in page and "writes/exact_match" in page
    # the scores of the last step are those of the finished model
    flags = ["--tasks", "choices", "--include_path", str(tasks), "--limit", "2", "--out_dir", "scores"]
    assert main(["evaluate", "out/final", "--dtype", "float32", *flags]) == 0
    results = json.loads(Path("scores/results.json").read_text())["results"]
    assert results["choices"]["acc,none"] == float(rows[-1]["tasks/choices/acc"])


@pytest.mark.parametrize("name", ["data_shard", "tensor", "context", "pipeline"])
def test_layouts_that_split_the_model_are_refused(name: str) -> None:
    layout: dict[str, Any] = {"data_shard": 1, name: 2}
    with pytest.raises(
        UserError, match=rf"^eval\.tasks: books is not supported with parallel\.{name}: 2, .*replicate: 2"
    ):
        Pretrain("toy", eval=EvalArgs(tasks="books"), devices=2, parallel=ParallelArgs(**layout))
    Pretrain("toy", eval=EvalArgs(tasks="books"), devices=2, parallel=ParallelArgs(data_replicate=2, data_shard=1))
    with pytest.raises(UserError, match=r"^eval\.task_limit: 3 .*eval\.tasks: null"):
        EvalArgs(task_limit=3)
