"""An HTML report of a run in a single file, without external resources."""

import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from litgpt.errors import UserError
from litgpt.files import read_json_object, write_text
from litgpt.recipe.to_yaml import format_yaml
from litgpt.recipe.train import BestArgs, GuardArgs
from litgpt.train import history
from litgpt.train.best_metric import BestMetric
from litgpt.train.console import TASK_PREFIX, format_duration, format_trained
from litgpt.train.guard import Guard
from litgpt.train.router_training import LOAD_FILE
from litgpt.train.run_record import RECORD_FILE

Rows = list[dict[str, float]]
Table = dict[str, list[float | None]]
"""Columns of equal length; None for values that are missing or not finite."""

COLORS = ("first", "second")  # classes of the page's style
MAX_POINTS = 1500  # per curve: more than the pixels of the page, and few enough for a small file
AXES = {"step": "step", "tokens": "total_tokens", "time": "time"}
"""Column of each horizontal axis of the charts."""


def write_report(out_dir: Path, output: Path | None = None) -> Path:
    """Write the report of the newest run in `out_dir` and return its path.

    Raises:
        UserError: if the folder holds no metrics, or a file in it is not valid.
    """
    from jinja2 import Environment, FileSystemLoader

    path, rows = read_newest_metrics(out_dir)
    record = read_record(out_dir / RECORD_FILE)
    recipe = read_text(out_dir / "recipe.yaml")
    guard, best_args = load_settings(recipe)
    best = find_best(rows, best_args)
    speed = "items_per_sec" if any("items_per_sec" in row for row in rows) else "device/items_per_sec"
    page = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    ).get_template("report.html.j2")
    output = output or out_dir / "report.html"
    name = out_dir.name or str(out_dir)
    text = page.render(
        title=record["model"]["name"] if record else name,
        lead=" · ".join([record["task"], name, format_dates(record), get_end_reason(record)]) if record else "",
        tiles=build_tiles(rows, find_skipped(rows), speed, best),
        facts=build_facts(record),
        page=build_charts(rows, speed, list_marks(record, best)),
        metrics=path.relative_to(out_dir),
        events=find_events(rows, guard, record, best),
        samples=read_samples(out_dir / "samples.jsonl"),
        load=read_load(out_dir / LOAD_FILE),
        changes=format_yaml(record.get("changes", {})) if record else "",
        recipe=recipe,
    )
    write_text(output, text)
    return output


def read_newest_metrics(out_dir: Path) -> tuple[Path, Rows]:
    """Find and read the newest metrics file of a run."""
    if not out_dir.is_dir():
        raise UserError(f"out_dir: {out_dir} is not a folder; give the out_dir of a run that was trained")
    root = out_dir / "logs" / "csv"
    paths = [root / f"version_{number}" / history.FILE_NAME for number in history.list_versions(root)]
    existing = [path for path in paths if path.exists()]
    if not existing:
        raise UserError(f"out_dir: {out_dir} holds no logs/csv/version_N/{history.FILE_NAME}; give a run's out_dir")
    _, rows = history.read_metrics(existing[-1])
    if not rows:
        raise UserError(f"{existing[-1]}: no step was logged yet; wait until one is, after train.log_interval steps")
    return existing[-1], rows


def read_record(path: Path) -> dict[str, Any]:
    """Read the record of a run, which is empty for runs of versions that wrote none.

    Raises:
        UserError: if it is not a record.
    """
    record = read_json_object(path)
    try:
        build_facts(record)
        find_events([], GuardArgs(), record, BestMetric(None))
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, ArithmeticError):
        raise UserError(f"{path}: is not the record of a run; remove the file") from None
    return record


def format_dates(record: Mapping[str, Any]) -> str:
    """Format the dates at which a run first started and last ended."""
    first, last = record["starts"][0], record["starts"][-1]
    end = (last.get("end") or {}).get("date")
    dates = [first["date"], end] if end else [first["date"]]
    return " to ".join(f"{datetime.fromisoformat(date):%Y-%m-%d %H:%M}" for date in dates)


def get_end_reason(record: Mapping[str, Any]) -> str:
    """The reason why a run ended."""
    end = record["starts"][-1].get("end")
    return end["reason"] if end else "no end was recorded: the process was killed, or is still running"


def build_facts(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Name and value of the facts about a run: its end, model, data, machine and software; none without a record."""
    if not record:
        return []
    model, data, start = record["model"], record["data"], record["starts"][-1]
    trained, total = model["trained_parameters"], model["parameters"]
    samples, length, held_out = data["samples"], data["sequence_length"], data["validation_samples"]
    tokens = f", {data['tokens']:,} tokens in all" if data.get("tokens") else ""
    size = ("unknown number" if samples is None else f"{samples:,} an epoch") + tokens
    settings = [f"{name}: {value}" for name, value in data["settings"].items()]
    starts = len(record["starts"])
    facts = [
        ("Task", f"{record['task']}, {format_dates(record)}"),
        ("End", get_end_reason(record)),
        ("Parameters", f"{total:,}, {format_trained(trained, total)}"),
        ("Initial weights", record.get("weights") or "random"),
        ("Method", record.get("tuner")),
        ("Loss", record.get("loss")),
        ("Data", ", ".join((data["source"], *settings))),
        ("Samples", f"{size}, at most {length:,} tokens each" + (f"; {held_out:,} for validation" if held_out else "")),
        ("Precision", start["precision"]),
        ("Machine", f"{start['host']}, {start['system']}, {start['processes']} x {start['device']}"),
        ("Layout", ", ".join(f"{axis} {degree}" for axis, degree in start["layout"].items() if degree > 1)),
        ("Software", ", ".join(f"{name} {version}" for name, version in start["versions"].items())),
        ("Starts", f"{starts}, the last at step {start['step']:,}" if starts > 1 else None),
    ]
    return [(name, value) for name, value in facts if value]


def read_text(path: Path) -> str | None:
    """Read a text file; None if it does not exist."""
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None


def read_samples(path: Path) -> list[dict[str, Any]]:
    """Read the samples generated during training, oldest first: dicts of step, prompt and continuation."""
    samples = []
    for number, line in enumerate((read_text(path) or "").splitlines(), start=1):
        try:
            row = json.loads(line)
            continuation = row["text"].removeprefix(row["prompt"])
            samples.append({"step": int(row["step"]), "prompt": row["prompt"], "text": continuation})
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{path}: line {number} is not JSON with step, prompt and text; remove the line") from None
    return samples


def read_load(path: Path) -> list[tuple[int, list[tuple[float, float]]]]:
    """Read the last load of the experts: layers, and of each expert its load and the opacity that shows it.

    Raises:
        UserError: if the file is not such a table.
    """
    table = read_json_object(path)
    try:
        return [(int(layer), [(load, round(min(load / 2, 1), 2)) for load in table[layer]]) for layer in table]
    except (TypeError, ValueError):
        raise UserError(f"{path}: is not a table of loads by layer; remove the file") from None


def get_finite_values(rows: Rows, name: str) -> tuple[list[float], list[float]]:
    """The steps at which a column is finite, and its values."""
    points = [(row["step"], row[name]) for row in rows if math.isfinite(row.get(name, math.nan))]
    return [step for step, _ in points], [value for _, value in points]


def find_skipped(rows: Rows) -> list[tuple[int, int]]:
    """Find the logged steps at which the count of skipped steps increased, and by how much."""
    steps, counts = get_finite_values(rows, "skipped_steps")
    changes = zip(steps, counts, [0.0, *counts], strict=False)
    return [(int(step), int(count - before)) for step, count, before in changes if count > before]


def find_spikes(rows: Rows, settings: GuardArgs) -> list[tuple[int, str]]:
    """Find the steps whose loss the run's guard reports as a spike, and its messages."""
    guard = Guard(settings)
    points = zip(*get_finite_values(rows, "loss"), strict=True)
    return [(int(step), message) for step, loss in points if (message := guard.record(int(step), loss))]


def load_settings(recipe: str | None) -> tuple[GuardArgs, BestArgs | None]:
    """Load the groups `guard` and `checkpoint.best` of a recipe in YAML; defaults for what it does not have."""
    try:
        groups = yaml.safe_load(recipe or "") or {}
        best = groups.get("checkpoint", {}).get("best")
        return GuardArgs(**groups.get("guard", {})), None if best is None else BestArgs(**best)
    except (yaml.YAMLError, AttributeError, TypeError) as error:
        raise UserError(f"recipe.yaml: cannot be read ({error}); fix or remove it") from None


def find_best(rows: Rows, settings: BestArgs | None) -> BestMetric:
    """Find the best evaluation; none without settings."""
    best = BestMetric(settings)
    for row in rows:
        if settings and settings.metric in row:
            best.record(int(row["step"]), row)
    return best


def build_tiles(rows: Rows, skips: list[tuple[int, int]], speed: str, best: BestMetric) -> list[tuple[str, str]]:
    """Name and value of the figures at the top of the page; `speed` is the column of tokens per second."""

    def format_column(
        name: str, form: Callable[[float], str], reduce: Callable[[list[float]], float] = lambda values: values[-1]
    ) -> str:
        values = get_finite_values(rows, name)[1]
        return form(reduce(values)) if values else ""

    tiles = [
        ("Steps", format_column("step", "{:,.0f}".format)),
        ("Tokens", format_column("total_tokens", "{:,.0f}".format)),
        ("Time", format_column("time", format_duration)),
        ("Last loss", format_column("loss", "{:.4f}".format)),
        ("Validation loss", format_column("val_loss", "{:.4f}".format)),
        ("Best validation", format_column("val_loss", "{:.4f}".format, min)),
        ("Best checkpoint", "" if best.step is None else f"step {best.step:,}"),
        ("Tokens/s", format_column(speed, "{:,.0f}".format, statistics.median)),
        ("MFU", format_column("device/mfu", "{:.1%}".format, statistics.median)),
        ("Memory", format_column("memory_gb", "{:.2f} GB".format, max)),
        ("Skipped steps", f"{sum(count for _, count in skips):,}" if skips else ""),
    ]
    return [(name, value) for name, value in tiles if value]


def find_events(rows: Rows, settings: GuardArgs, record: Mapping[str, Any], best: BestMetric) -> list[tuple[int, str]]:
    """Find skipped steps, loss spikes, the best evaluation, and the starts and ends of a run, in order of steps."""
    skips = [
        (step, f"{count} skipped since the previous row: gradient or loss was not finite")
        for step, count in find_skipped(rows)
    ]
    starts = record.get("starts", [])
    resumes = [(start["step"], f"resumed on {start['host']}, {start['date']}") for start in starts[1:]]
    ends = [(start["end"]["step"], f"ended: {start['end']['reason']}") for start in starts if start.get("end")]
    best_events = [] if best.step is None else [(best.step, f"the best checkpoint: {best.describe()}")]
    return sorted([*skips, *find_spikes(rows, settings), *best_events, *ends, *resumes], key=lambda event: event[0])


def list_marks(record: Mapping[str, Any], best: BestMetric) -> list[tuple[int, str]]:
    """The steps that the charts mark, and why: the steps from which the run was resumed, and the best one."""
    marks = [(start["step"], "resumed") for start in record.get("starts", [])[1:]]
    return marks if best.step is None else [*marks, (best.step, "the best checkpoint")]


def build_charts(rows: Rows, speed: str, marks: Sequence[tuple[int, str]]) -> dict[str, Any]:
    """Build the charts that have a curve, and their numbers, as JSON values for the page's script.

    Args:
        speed: the column of tokens per second.
    """
    labels_by_title = {
        "Loss": {"loss": "training", "val_loss": "validation"},
        "Learning rate": {"learning_rate": ""},
        "Tokens per second": {speed: ""},
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
