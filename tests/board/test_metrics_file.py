"""Metrics files that grow, are replaced, or are not whole."""

import statistics
from pathlib import Path

import pytest

from litgpt.board.metrics_file import MetricsFile, read_last_figures
from litgpt.train.charts import MAX_POINTS
from litgpt.train.history import History, read_metrics
from tests.board.board_server import write_metrics


def test_only_new_lines_are_read(tmp_path: Path) -> None:
    history = History(tmp_path / "metrics.csv")
    history.append({"step": 1, "loss": 3.0})
    file = MetricsFile(history.path)
    file.read()
    assert file.rows == [{"step": 1, "loss": 3.0}]
    with history.path.open("r+") as opened:
        opened.write("step,loss\n9")  # which is not read again
    history.append({"step": 2, "loss": 2.0})
    with history.path.open("a") as opened:
        opened.write("3,1.")
    file.read()
    assert [row["step"] for row in file.rows] == [1, 2]
    with history.path.open("a") as opened:
        opened.write("5\n")
    file.read()
    assert file.rows[-1] == {"step": 3, "loss": 1.5}


def test_a_file_that_was_replaced_is_read_from_its_start(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    first = History(path)
    for step in range(1, 9):
        first.append({"step": step, "loss": 1.0})
    file = MetricsFile(path)
    file.read()
    resumed = History(path, resumed_step=4)
    file.read()
    assert [row["step"] for row in file.rows] == [1, 2, 3, 4]
    resumed.append({"step": 5, "loss": 1.0, "grad_norm": 2.0})  # a new column
    file.read()
    assert file.rows == read_metrics(path)[1]


def test_a_long_run_is_condensed_to_means(tmp_path: Path) -> None:
    steps = 5 * MAX_POINTS
    path = write_metrics(tmp_path, steps)
    whole, parts = MetricsFile(path), MetricsFile(tmp_path / "parts.csv")
    whole.read()
    data = path.read_bytes()
    for end in (*range(0, len(data), 20_011), len(data)):
        (tmp_path / "parts.csv").open("ab").write(data[(tmp_path / "parts.csv").stat().st_size : end])
        parts.read()
    assert parts.rows == whole.rows and parts.rows_per_mean == 4
    assert MAX_POINTS <= len(whole.means) <= 2 * MAX_POINTS
    assert whole.means[1]["step"] == statistics.fmean((5, 6, 7, 8))
    assert len(whole.validation) == steps // 10 and whole.validation[-1]["total_tokens"] == steps * 8
    assert whole.latest[-1]["step"] == steps


@pytest.mark.parametrize("line", ["1,2,3", "x,1", ",1", "\0", "-1,2", '"', "é" * 9])
def test_lines_that_are_not_rows_are_counted(tmp_path: Path, line: str) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text(f"step,loss\n1,3.0\n{line}\n2,2.0\n", encoding="latin-1")
    file = MetricsFile(path)
    file.read()
    assert [row["step"] for row in file.rows][:1] == [1] and file.invalid >= 1
    assert read_last_figures(path).last["step"] == 2


@pytest.mark.parametrize("text", ["", "step,lo", "\n", "\0\n", "a,b\n1,2\n", "step,loss\n", "step,loss\n1"])
def test_a_file_that_has_only_just_begun_has_no_rows(tmp_path: Path, text: str) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text(text)
    file = MetricsFile(path)
    file.read()
    assert file.rows == [] and read_last_figures(path) == ({}, [])


def test_a_summary_is_of_the_end_and_of_points_between(tmp_path: Path) -> None:
    summary = read_last_figures(write_metrics(tmp_path, 20_000))
    assert summary.last["step"] == 20_000 and summary.last["val_loss"] == pytest.approx(3, abs=1e-3)
    steps = [step for step, _ in summary.curve]
    assert len(steps) > 90 and steps == sorted(steps) and (steps[0], steps[-1]) == (1, 20_000)
