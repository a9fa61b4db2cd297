"""The record of benchmarks says which figures have fallen."""

import shutil
from pathlib import Path

from benchmarks.record import RECORD, Row, add_figures, find_fallen, read_rows


def build_rows(figure: str, *values: float, host: str = "host") -> list[Row]:
    return [Row("2026-01-01", f"c{number}", host, figure, f"{value}") for number, value in enumerate(values)]


def test_a_figure_that_is_more_than_5_percent_below_its_best_has_fallen() -> None:
    assert find_fallen(build_rows("pretrain tokens/s of litgpt", 1.6, 1.7, 1.62)) == []
    assert find_fallen(build_rows("pretrain tokens/s of litgpt", 1.6, 1.7, 1.61)) == [
        "pretrain tokens/s of litgpt: 1.7 at c1, 1.61 at c2 (host)"
    ]


def test_memory_falls_when_it_grows() -> None:
    assert find_fallen(build_rows("pretrain memory of litgpt", 0.5, 0.4)) == []
    assert len(find_fallen(build_rows("pretrain memory of litgpt", 0.4, 0.43))) == 1


def test_figures_of_another_host_are_not_compared() -> None:
    assert find_fallen(build_rows("x of limit", 0.8) + build_rows("x of limit", 0.4, host="other")) == []


def test_figures_are_added_to_the_table(tmp_path: Path) -> None:
    record = Path(shutil.copy(RECORD, tmp_path))
    before = read_rows(record)
    add_figures(record, "pretrain", {"32-true, of limit": 0.61803})
    *earlier, row = read_rows(record)
    assert earlier == before and (row.figure, row.value) == ("pretrain 32-true, of limit", "0.618")
    assert "cores, torch" in row.host and row.commit
