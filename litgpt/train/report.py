"""An HTML report of a run in a single file, without external resources."""

import io
import json
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from litgpt.errors import UserError
from litgpt.files import write_text
from litgpt.recipe.train import GuardArgs
from litgpt.train import history
from litgpt.train.console import format_duration
from litgpt.train.guard import Guard

Rows = list[dict[str, float]]
Curve = tuple[str, list[float], list[float]]
"""Label, steps and values."""

INK = "#010203"  # a placeholder for the color of text and axes, replaced by that of the page
COLORS = ("#3b82f6", "#f97316")  # readable on white and on black
MAX_POINTS = 1500  # per curve: more than the pixels of the page, and few enough for a small file


def write_report(out_dir: Path, output: Path | None = None) -> Path:
    """Write the report of the newest run in `out_dir` and return its path.

    Raises:
        UserError: if the folder holds no metrics, or a file in it is not valid.
    """
    from jinja2 import Environment, FileSystemLoader

    rows = read_newest_metrics(out_dir)
    recipe = read_text(out_dir / "recipe.yaml")
    skips = find_skipped(rows)
    speed = "items_per_sec" if any("items_per_sec" in row for row in rows) else "device/items_per_sec"
    page = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    ).get_template("report.html.j2")
    output = output or out_dir / "report.html"
    text = page.render(
        title=out_dir.name or str(out_dir),
        tiles=build_tiles(rows, skips, speed),
        charts=build_charts(rows, speed),
        skips=skips,
        spikes=find_spikes(rows, load_guard_args(recipe)),
        samples=read_samples(out_dir / "samples.jsonl"),
        recipe=recipe,
    )
    write_text(output, text)
    return output


def read_newest_metrics(out_dir: Path) -> Rows:
    """Read the rows of the newest metrics file of a run."""
    if not out_dir.is_dir():
        raise UserError(f"out_dir: {out_dir} is not a folder; give the out_dir of a run that was trained")
    root = out_dir / "logs" / "csv"
    paths = [root / f"version_{number}" / history.FILE_NAME for number in history.list_versions(root)]
    existing = [path for path in paths if path.exists()]
    if not existing:
        raise UserError(f"out_dir: {out_dir} holds no logs/csv/version_N/{history.FILE_NAME}; give a run's out_dir")
    _, rows = history.read_metrics(existing[-1])
    if not rows:
        raise UserError(f"{existing[-1]}: no step was logged yet; train for longer than train.log_interval")
    return rows


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


def load_guard_args(recipe: str | None) -> GuardArgs:
    """Load the group `guard` of a recipe in YAML; defaults for settings that it does not have."""
    try:
        groups = yaml.safe_load(recipe or "") or {}
        return GuardArgs(**groups.get("guard", {}))
    except (yaml.YAMLError, AttributeError, TypeError) as error:
        raise UserError(f"recipe.yaml: cannot be read ({error}); fix or remove it") from None


def build_tiles(rows: Rows, skips: list[tuple[int, int]], speed: str) -> list[tuple[str, str]]:
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
        ("Last validation loss", format_column("val_loss", "{:.4f}".format)),
        ("Best validation loss", format_column("val_loss", "{:.4f}".format, min)),
        ("Tokens/s, median", format_column(speed, "{:,.0f}".format, statistics.median)),
        ("MFU, median", format_column("device/mfu", "{:.1%}".format, statistics.median)),
        ("Most memory", format_column("memory_gb", "{:.2f} GB".format, max)),
        ("Skipped steps", format_column("skipped_steps", lambda _: f"{sum(count for _, count in skips):,}")),
    ]
    return [(name, value) for name, value in tiles if value]


def build_charts(rows: Rows, speed: str) -> list[tuple[str, str]]:
    """Title and SVG of each chart that has a curve; `speed` is the column of tokens per second."""
    labels_by_title = {
        "Loss": {"loss": "training", "val_loss": "validation"},
        "Learning rate": {"learning_rate": ""},
        "Tokens per second": {speed: ""},
        "Gradient norm": {"grad_norm": ""},
    }
    charts = []
    for title, labels in labels_by_title.items():
        curves = [(label, *get_finite_values(rows, name)) for name, label in labels.items()]
        if present := [curve for curve in curves if curve[1]]:
            charts.append((title, draw_chart(title, present)))
    return charts


def draw_chart(title: str, curves: Sequence[Curve]) -> str:
    """Draw curves over the steps as SVG, with text in the color of the page's."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    style: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": title, "font.size": 10}
    style |= {name: INK for name in ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")}
    buffer = io.StringIO()
    with rc_context(style):
        figure = Figure(figsize=(7.2, 3.2), layout="constrained")
        axes = figure.add_subplot()
        for (label, *points), color in zip(curves, COLORS, strict=False):
            steps, values = map(downsample, points)
            marker = "o" if len(steps) < 30 else ""
            axes.plot(steps, values, color=color, linewidth=1.4, label=label, marker=marker, ms=3.5)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color=INK, alpha=0.12, linewidth=0.8)
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if len(curves) > 1:
            axes.legend(frameon=False)
        metadata = {"Date": None, "Creator": None, "Format": None, "Type": None}
        figure.savefig(buffer, format="svg", transparent=True, metadata=metadata)
    svg = buffer.getvalue()
    return svg[svg.index("<svg") :].replace(INK, "currentColor")


def downsample(values: Sequence[float]) -> list[float]:
    """At most `MAX_POINTS` values: means over neighbors."""
    size = -(-len(values) // MAX_POINTS)
    return [statistics.fmean(values[start : start + size]) for start in range(0, len(values), size)]
