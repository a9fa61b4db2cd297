"""One unbroken history, whatever kills the run; loggers by name."""

import json
import sqlite3
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from litgpt.errors import UserError
from litgpt.recipe.train import LogArgs
from litgpt.train import history, loggers


def steps(path: Path) -> list[float]:
    """The step column of a metrics file."""
    return [row["step"] for row in history.read_metrics(path)[1]]


def logged(out_dir: Path, numbers: range, resumed_step: int | None = None) -> loggers.CSVLogger:
    """A CSV logger that has logged a loss and, every second step, a validation loss."""
    logger = loggers.build_logger("csv", out_dir, LogArgs(), resumed_step)
    assert isinstance(logger, loggers.CSVLogger)
    for number in numbers:
        logger.log_metrics({"loss": torch.tensor(1.5) / number}, step=number)
        if number % 2 == 0:
            logger.log_metrics({"val_loss": 2.0 / number}, step=number)
    return logger


def test_rows_are_there_as_soon_as_they_are_logged(tmp_path: Path) -> None:
    logger = logged(tmp_path, range(1, 4))
    assert logger.path == tmp_path / "logs" / "csv" / "version_0" / "metrics.csv"
    columns, rows = history.read_metrics(logger.path)
    assert columns == ["step", "loss", "val_loss"]
    assert rows == [
        {"step": 1, "loss": 1.5},
        {"step": 2, "loss": 0.75},
        {"step": 2, "val_loss": 1.0},
        {"step": 3, "loss": 0.5},
    ]


def test_numbers_come_back_to_the_bit(tmp_path: Path) -> None:
    file = history.History(tmp_path / "metrics.csv")
    values = {"step": 1, "loss": 0.1 + 0.2, "tiny": 5e-324, "huge": 1.7976931348623157e308}
    file.append(values)
    assert history.read_metrics(file.path)[1] == [values]


def test_a_fresh_run_gets_a_version_of_its_own(tmp_path: Path) -> None:
    logged(tmp_path, range(1, 3))
    (tmp_path / "logs" / "csv" / "version_12").mkdir()
    logger = logged(tmp_path, range(1, 2))
    assert logger.version == 13
    assert steps(tmp_path / "logs" / "csv" / "version_0" / "metrics.csv") == [1, 2, 2]


def test_a_resumed_run_goes_on_in_the_same_file_without_the_steps_it_repeats(tmp_path: Path) -> None:
    logged(tmp_path, range(1, 8))
    resumed = logged(tmp_path, range(5, 9), resumed_step=4)
    assert resumed.version == 0
    assert steps(resumed.path) == [1, 2, 2, 3, 4, 4, 5, 6, 6, 7, 8, 8]
    unbroken = logged(tmp_path / "other", range(1, 9))
    assert resumed.path.read_bytes() == unbroken.path.read_bytes()


def test_a_resumed_run_without_a_file_begins_one(tmp_path: Path) -> None:
    assert steps(logged(tmp_path, range(5, 7), resumed_step=4).path) == [5, 6, 6]


def test_building_a_logger_touches_nothing(tmp_path: Path) -> None:
    logged(tmp_path, range(1, 8))
    path = tmp_path / "logs" / "csv" / "version_0" / "metrics.csv"
    before = path.read_bytes()
    loggers.build_logger("csv", tmp_path, LogArgs(), 2)
    loggers.build_logger("csv", tmp_path, LogArgs())
    assert path.read_bytes() == before
    assert history.list_versions(path.parent.parent) == [0]


@settings(max_examples=60, deadline=None)
@given(cut=st.integers(min_value=0, max_value=10_000), resumed_step=st.integers(min_value=0, max_value=7))
def test_a_kill_in_the_middle_of_a_line_costs_that_line_only(
    cut: int, resumed_step: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("run")
    path = logged(folder, range(1, 8)).path
    whole = path.read_bytes()
    header = whole.index(b"\n") + 1  # rewritten whole by a rename, so it cannot be cut
    path.write_bytes(whole[: max(header, cut % (len(whole) + 1))])
    kept = [number for number in steps(path) if number <= resumed_step]
    resumed = logged(folder, range(resumed_step + 1, 9), resumed_step=resumed_step)
    found = steps(resumed.path)
    assert found[: len(kept)] == kept
    assert sorted(found) == found
    assert set(found) >= set(range(resumed_step + 1, 9))


def test_a_new_column_leaves_earlier_rows_as_they_are(tmp_path: Path) -> None:
    file = history.History(tmp_path / "metrics.csv")
    file.append({"step": 1, "loss": 3.0})
    file.append({"step": 2, "grad_norm": 0.5, "loss": 2.0})
    assert history.read_metrics(file.path) == (
        ["step", "loss", "grad_norm"],
        [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0, "grad_norm": 0.5}],
    )
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "line 1"),
        ("loss,val_loss\n1,2\n", "line 1"),
        ("step,loss,loss\n1,2,3\n", "line 1"),
        ("step,loss\n1,2,3\n", "line 2 has 3 fields"),
        ("step,loss\n1,2\n2,many\n", "line 3"),
        ("step,loss\n,2\n", "line 2 has no step"),
        ("step,loss\nnan,2\n", "line 2 has no step"),
    ],
)
def test_a_file_that_is_no_history_is_refused_by_line(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text(text)
    with pytest.raises(UserError, match=says) as error:
        history.read_metrics(path)
    assert str(path) in str(error.value)


def test_tensorboard_goes_on_where_the_run_was_cut(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for numbers, resumed_step in ((range(1, 8), None), (range(5, 9), 4)):
        logger = loggers.build_logger("tensorboard", tmp_path, LogArgs(), resumed_step)
        for number in numbers:
            logger.log_metrics({"loss": float(number)}, step=number)
        logger.finalize("success")
    folder = tmp_path / "logs" / "tensorboard" / "version_0"
    events = EventAccumulator(str(folder)).Reload()
    assert [event.step for event in events.Scalars("loss")] == list(range(1, 9))


def test_runs_that_share_a_folder_of_tensorboard_keep_their_versions(tmp_path: Path) -> None:
    shared = LogArgs(save_dir=tmp_path / "all", tensorboard_queue_size=3)
    versions = []
    for run, resumed_step in (("a", None), ("b", None), ("a", 2), ("b", 2), ("c", None), ("d", 2)):
        logger: Any = loggers.build_logger("tensorboard", tmp_path / run, shared, resumed_step)
        assert Path(logger.log_dir).parent == tmp_path / "all"
        versions.append(logger.version)
    assert versions == [0, 1, 0, 1, 2, 3]
    assert logger.experiment.max_queue == 3


@pytest.mark.parametrize("name", ["wandb", "mlflow", "trackio", "swanlab"])
def test_a_missing_package_is_named_in_one_line(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _package: None)
    with pytest.raises(UserError, match=f"pip install {name}") as error:
        loggers.build_logger(name, tmp_path, LogArgs())
    assert "\n" not in str(error.value)


def test_litlogger_is_refused_with_the_names_that_do(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="csv, tensorboard, wandb, mlflow, trackio, swanlab"):
        loggers.build_logger("litlogger", tmp_path, LogArgs())


@pytest.mark.parametrize(
    ("log", "environment", "expected"),
    [
        (LogArgs(), {}, ("pretrain-pythia-14m", None, None)),
        (
            LogArgs(),
            {"WANDB_PROJECT": "p", "WANDB_RUN_NAME": "r", "WANDB_RUN_GROUP": "g"},
            ("p", "r", "g"),
        ),
        (
            LogArgs(project="mine", run="one", group="all"),
            {"WANDB_PROJECT": "p", "WANDB_RUN_NAME": "r"},
            ("mine", "one", "all"),
        ),
    ],
)
def test_wandb_names_come_from_the_recipe_then_the_environment_then_the_model(
    log: LogArgs,
    environment: dict[str, str],
    expected: tuple[Any, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr("lightning.pytorch.loggers.wandb.WandbLogger", lambda **arguments: given.update(arguments))
    monkeypatch.setattr("importlib.util.find_spec", lambda _package: True)
    for name in ("WANDB_PROJECT", "WANDB_RUN_NAME", "WANDB_RUN_GROUP"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    for resumed_step in (None, 4):
        earlier = given.get("id")
        loggers.build_logger("wandb", tmp_path, log, resumed_step, project="pretrain-pythia-14m")
        assert (given["project"], given["name"], given["group"]) == expected
        assert resumed_step is None or given["id"] == earlier


class FakeRun:
    """A run of a package: its settings, and what is logged."""

    def __init__(self, **settings: Any) -> None:
        self.settings, self.rows, self.finished = settings, [], False

    def log(self, metrics: dict[str, float], step: int) -> None:
        self.rows.append((step, metrics))

    def finish(self) -> None:
        self.finished = True


@pytest.mark.parametrize(("package", "key"), [("trackio", "name"), ("swanlab", "id")])
def test_a_run_of_a_package_starts_at_the_first_log_and_is_resumed(
    package: str, key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[FakeRun] = []

    def start(**settings: Any) -> FakeRun:
        started.append(FakeRun(**settings))
        return started[-1]

    monkeypatch.setitem(sys.modules, package, SimpleNamespace(init=start))
    monkeypatch.setattr("importlib.util.find_spec", lambda _package: True)
    for resumed_step in (None, 2):
        logger = loggers.build_logger(package, tmp_path, LogArgs(group="g"), resumed_step, project="pretrain-toy")
        assert len(started) == (resumed_step is not None)
        logger.log_metrics({"loss": torch.tensor(1.5), "step": 3, "time": 2}, step=3)
        logger.finalize("success")
    assert [run.rows for run in started] == [[(3, {"loss": 1.5, "seconds": 2.0})]] * 2 and all(
        run.finished for run in started
    )
    first, second = (run.settings for run in started)
    assert (first["project"], first["group"], first["resume"], second["resume"]) == (
        "pretrain-toy",
        "g",
        "never",
        "allow",
    )
    assert first[key] == second[key] == logger.version


def test_trackio_itself_keeps_the_rows_of_a_resumed_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # which it reads when it is imported
    pytest.importorskip("trackio")
    for steps, resumed_step in ((range(1, 3), None), (range(3, 5), 2)):
        logger = loggers.build_logger("trackio", tmp_path / "out", LogArgs(project="p", run="r"), resumed_step)
        for step in steps:
            logger.log_metrics({"loss": 1 / step}, step=step)
        logger.finalize("success")
    database = sqlite3.connect(tmp_path / "trackio" / "p.db")
    rows = database.execute("select step, metrics from metrics order by step").fetchall()
    assert [(step, json.loads(metrics)["loss"]) for step, metrics in rows] == [(step, 1 / step) for step in range(1, 5)]


def test_swanlab_itself_writes_its_files_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("swanlab")
    monkeypatch.setenv("SWANLAB_MODE", "offline")
    monkeypatch.chdir(tmp_path)
    logger = loggers.build_logger("swanlab", tmp_path / "out", LogArgs(save_dir=tmp_path / "files", run="r"))
    logger.log_metrics({"loss": 1.5}, step=1)
    logger.finalize("success")
    (folder,) = (tmp_path / "files").glob("run-*")
    assert folder.name.endswith(str(logger.version)) and list(folder.glob("*.swanlab"))
