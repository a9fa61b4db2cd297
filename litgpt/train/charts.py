"""The charts of a report: their curves as JSON values, which `charts.js` draws."""

import math
import statistics
from collections.abc import Sequence
from typing import Any

from litgpt.train.console import TASK_PREFIX

Rows = list[dict[str, float]]
Table = dict[str, list[float | None]]
"""Columns of equal length; None for values that are missing or not finite."""

COLORS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth")  # classes of report.css
MAX_POINTS = 1500  # per curve: more than the pixels of the page, and few enough for a small file
AXES = {"step": "step", "tokens": "total_tokens", "time": "time"}
"""Column of each horizontal axis of the charts."""


def get_finite_values(rows: Rows, name: str) -> tuple[list[float], list[float]]:
    """The steps at which a column is finite, and its values."""
    points = [(row["step"], row[name]) for row in rows if math.isfinite(row.get(name, math.nan))]
    return [step for step, _ in points], [value for _, value in points]


def find_speed_column(rows: Rows) -> str:
    """The column of the tokens per second of the whole run."""
    return "items_per_sec" if any("items_per_sec" in row for row in rows) else "device/items_per_sec"


def build_charts(rows: Rows, marks: Sequence[tuple[int, str]]) -> dict[str, Any]:
    """Build the charts that have a curve, and their numbers, as JSON values for the page's script.

    Args:
        marks: steps that the charts mark, and why.
    """
    labels_by_title = {
        "Loss": {"loss": "training", "val_loss": "validation"},
        "Learning rate": {"learning_rate": ""},
        "Tokens per second": {find_speed_column(rows): ""},
        "Gradient norm": {"grad_norm": ""},
        "Load of experts, relative to the mean": {
            "experts/max_load": "most loaded",
            "experts/min_load": "least loaded",
        },
        "Dropped share of tokens": {"experts/dropped": ""},
        "Router entropy": {"router/entropy": ""},
        "Balance loss": {"router/aux_loss": ""},
        "Loss of the first prediction layer": {"prediction_loss/1": ""},
    }
    scores = sorted({name for row in rows for name in row if name.startswith(TASK_PREFIX)})
    labels_by_title |= {name.removeprefix(TASK_PREFIX): {name: ""} for name in scores}
    charts: list[dict[str, Any]] = []
    for title, labels in labels_by_title.items():
        curves = [
            {
                "name": name,
                "label": label,
                "color": color,
                "rows": "validation" if name in ("val_loss", *scores) else "training",
                "wide": name == "val_loss",
                "smooth": name not in ("val_loss", "learning_rate", *scores),
            }
            for (name, label), color in zip(labels.items(), COLORS, strict=False)
            if get_finite_values(rows, name)[1]
        ]
        if curves:
            charts.append({"title": title, "curves": curves})
    training, validation = split_validation_rows(rows)
    drawn = [curve["name"] for chart in charts for curve in chart["curves"]]
    return {
        "charts": charts,
        "rows": {
            "training": tabulate(training, [name for name in drawn if name not in ("val_loss", *scores)]),
            "validation": tabulate(validation, ["val_loss", *scores]),
        },
        "marks": find_positions(training, marks),
    }


def split_validation_rows(rows: Rows) -> tuple[Rows, Rows]:
    """Split rows into those of training and those of validation, which get tokens and time of the row before them."""
    training: Rows = []
    validation: Rows = []
    position: dict[str, float] = dict.fromkeys(AXES.values(), 0.0)
    for row in rows:
        if "val_loss" in row or any(name.startswith(TASK_PREFIX) for name in row):
            validation.append(position | row)
        else:
            training.append(row)
            position |= {column: row[column] for column in AXES.values() if column in row}
    return training, validation


def tabulate(rows: Rows, names: Sequence[str]) -> Table:
    """The axes and columns of at most `MAX_POINTS` rows, each the mean over neighbors, with 6 digits."""
    size = max(1, -(-len(rows) // MAX_POINTS))
    groups = [rows[start : start + size] for start in range(0, len(rows), size)]
    columns = AXES | {name: name for name in names}
    return {name: [average(group, column) for group in groups] for name, column in columns.items()}


def average(rows: Rows, name: str) -> float | None:
    """The mean of the finite values of a column; None if there are none."""
    values = get_finite_values(rows, name)[1]
    return float(f"{statistics.fmean(values):.6g}") if values else None


def find_positions(rows: Rows, marks: Sequence[tuple[int, str]]) -> list[dict[str, Any]]:
    """Find the position of each mark on every axis, in the last row up to its step."""
    positions = []
    for step, text in marks:
        before = [row for row in rows if row["step"] <= step] or [{}]
        position = {axis: before[-1].get(column, 0.0) for axis, column in AXES.items()}
        positions.append(position | {"step": step, "text": text})
    return positions


def build_comparison_charts(runs: Sequence[Rows]) -> dict[str, Any]:
    """Build charts with a curve of each of several runs, and their numbers, as JSON values for the page's script."""
    titles: dict[str, list[dict[str, Any]]] = {}
    tables: dict[str, Table] = {}
    for number, (rows, color) in enumerate(zip(runs, COLORS, strict=False)):
        page = build_charts(rows, [])
        tables |= {f"{kind}/{number}": table for kind, table in page["rows"].items()}
        for chart in page["charts"]:
            for curve in chart["curves"]:
                title = ", ".join(part for part in (chart["title"], curve["label"]) if part)
                place = {"rows": f"{curve['rows']}/{number}", "color": color, "run": number}
                titles.setdefault(title, []).append(curve | place)
    return {
        "charts": [{"title": title, "curves": curves} for title, curves in titles.items()],
        "rows": tables,
        "marks": [],
    }
