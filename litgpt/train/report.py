"""One HTML page about a run, readable without network."""

import io
import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from litgpt.errors import UserError
from litgpt.files import write_text
from litgpt.recipe.train import GuardArgs
from litgpt.train import history
from litgpt.train.console import format_duration
from litgpt.train.guard import Guard

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Rows = list[dict[str, float]]

INK = "#010203"  # a colour that nothing else has, given to text and axes, then swapped for the page's own
COLOURS = ("#3b82f6", "#f97316")  # these two stand out on white and on black
MOST_POINTS = 1500  # of a curve: more than the page has pixels, and few enough for a small file


def write_report(out_dir: Path, output: Path | None = None) -> Path:
    """Write the page about the newest run in `out_dir` and return its path.

    Raises:
        UserError: if the folder holds no metrics, or a file in it is not what it should be.
    """
    from jinja2 import Environment, FileSystemLoader

    rows = read_newest(out_dir)
    recipe = read_text(out_dir / "recipe.yaml")
    skips = find_skipped(rows)
    page = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    ).get_template("report.html.j2")
    output = output or out_dir / "report.html"
    text = page.render(
        title=out_dir.name or str(out_dir),
        tiles=tiles(rows, skips),
        charts=[(chart.title, draw(chart, rows)) for chart in CHARTS if chart.has_any(rows)],
        skips=skips,
        spikes=find_spikes(rows, guard_settings(recipe)),
        samples=read_samples(out_dir / "samples.jsonl"),
        recipe=recipe,
    )
    write_text(output, text)
    return output


def read_newest(out_dir: Path) -> Rows:
    """The rows of the newest metrics file of a run."""
    if not out_dir.is_dir():
        raise UserError(f"out_dir: {out_dir} is not a folder; give the out_dir of a run that was trained")
    root = out_dir / "logs" / "csv"
    numbers = [
        number for number in history.list_versions(root) if (root / f"version_{number}" / history.FILE_NAME).exists()
    ]
    if not numbers:
        raise UserError(f"out_dir: {out_dir} holds no logs/csv/version_N/{history.FILE_NAME}; give a run's out_dir")
    path = root / f"version_{numbers[-1]}" / history.FILE_NAME
    _, rows = history.read_metrics(path)
    if not rows:
        raise UserError(f"{path}: no step was logged yet; train for longer than train.log_interval")
    return rows


def read_text(path: Path) -> str | None:
    """The text of a file, if there is one."""
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None


def read_samples(path: Path) -> list[dict[str, Any]]:
    """The samples generated while training, oldest first: rows of step, prompt and continuation."""
    samples = []
    for number, line in enumerate((read_text(path) or "").splitlines(), start=1):
        try:
            row = json.loads(line)
            written = row["text"].removeprefix(row["prompt"])
            samples.append({"step": int(row["step"]), "prompt": row["prompt"], "text": written})
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{path}: line {number} is not JSON with step, prompt and text; remove the line") from None
    return samples


def column(rows: Rows, name: str) -> tuple[list[float], list[float]]:
    """The steps at which a column is finite, and its values."""
    points = [(row["step"], row[name]) for row in rows if math.isfinite(row.get(name, math.nan))]
    return [step for step, _ in points], [value for _, value in points]


def find_skipped(rows: Rows) -> list[tuple[int, int]]:
    """The logged steps at which the count of skipped steps had grown, and by how many."""
    steps, counts = column(rows, "skipped_steps")
    changes = zip(steps, counts, [0.0, *counts], strict=False)
    return [(int(step), int(count - before)) for step, count, before in changes if count > before]


def find_spikes(rows: Rows, settings: GuardArgs) -> list[tuple[int, str]]:
    """Find the steps whose loss the run's guard reports as a spike, and its messages."""
    guard = Guard(settings)
    messages = ((int(step), guard.record(int(step), loss)) for step, loss in zip(*column(rows, "loss"), strict=True))
    return [(step, text) for step, text in messages if text]


def guard_settings(recipe: str | None) -> GuardArgs:
    """The group `guard` of a recipe in YAML, or its defaults."""
    try:
        groups = yaml.safe_load(recipe or "") or {}
        return GuardArgs(**groups.get("guard", {}))
    except (yaml.YAMLError, AttributeError, TypeError) as error:
        raise UserError(f"recipe.yaml: cannot be read ({error}); fix or remove it") from None


def tiles(rows: Rows, skips: list[tuple[int, int]]) -> list[tuple[str, str]]:
    """Name and value of the figures at the head of the page."""

    def last(name: str, form: Callable[[float], str], pick: Callable[[list[float]], float] = lambda v: v[-1]) -> str:
        values = column(rows, name)[1]
        return form(pick(values)) if values else ""

    speed = "items_per_sec" if any("items_per_sec" in row for row in rows) else "device/items_per_sec"
    figures = [
        ("Steps", last("step", "{:,.0f}".format)),
        ("Tokens", last("total_tokens", "{:,.0f}".format)),
        ("Time", last("time", format_duration)),
        ("Last loss", last("loss", "{:.4f}".format)),
        ("Last validation loss", last("val_loss", "{:.4f}".format)),
        ("Best validation loss", last("val_loss", "{:.4f}".format, min)),
        ("Tokens/s, median", last(speed, "{:,.0f}".format, statistics.median)),
        ("MFU, median", last("device/mfu", "{:.1%}".format, statistics.median)),
        ("Most memory", last("memory_gb", "{:.2f} GB".format, max)),
        ("Skipped steps", f"{sum(count for _, count in skips):,}" if column(rows, "skipped_steps")[1] else ""),
    ]
    return [(name, value) for name, value in figures if value]


@dataclass(frozen=True)
class Chart:
    """One diagram over the steps, with one y axis."""

    title: str
    columns: tuple[tuple[str, str], ...]
    """Column and name of each curve."""
    instead: tuple[tuple[str, str], ...] = ()
    """Curves to draw if the columns are missing."""

    def curves(self, rows: Rows) -> list[tuple[str, list[float], list[float]]]:
        """Name, steps and values of the curves that the rows hold."""
        for columns in (self.columns, self.instead):
            curves = [(label, *column(rows, name)) for name, label in columns]
            if curves := [curve for curve in curves if curve[1]]:
                return curves
        return []

    def has_any(self, rows: Rows) -> bool:
        """Whether there is anything to draw."""
        return bool(self.curves(rows))


CHARTS = (
    Chart("Loss", (("loss", "training"), ("val_loss", "validation"))),
    Chart("Learning rate", (("learning_rate", ""),)),
    Chart("Tokens per second", (("items_per_sec", ""),), instead=(("device/items_per_sec", ""),)),
    Chart("Gradient norm", (("grad_norm", ""),)),
)


def draw(chart: Chart, rows: Rows) -> str:
    """Draw a chart as SVG whose text has the colour of the page's."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    style: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": chart.title, "font.size": 10}
    style |= {name: INK for name in ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")}
    buffer = io.StringIO()
    with rc_context(style):
        figure = Figure(figsize=(7.2, 3.2), layout="constrained")
        axes = figure.add_subplot()
        curves = chart.curves(rows)
        for (label, steps, values), colour in zip(curves, COLOURS, strict=False):
            add_curve(axes, steps, values, label, colour)
        finish(axes, legend=len(curves) > 1)
        metadata = {"Date": None, "Creator": None, "Format": None, "Type": None}
        figure.savefig(buffer, format="svg", transparent=True, metadata=metadata)
    svg = buffer.getvalue()
    return svg[svg.index("<svg") :].replace(INK, "currentColor")


def add_curve(axes: "Axes", steps: list[float], values: list[float], label: str, colour: str) -> None:
    """Draw one curve, with markers if it has few points."""
    steps, values = thin(steps), thin(values)
    axes.plot(steps, values, color=colour, linewidth=1.4, label=label, marker="o" if len(steps) < 30 else "", ms=3.5)


def thin(values: Sequence[float]) -> list[float]:
    """At most `MOST_POINTS` values: means over neighbours."""
    size = -(-len(values) // MOST_POINTS)
    return [statistics.fmean(values[start : start + size]) for start in range(0, len(values), size)]


def finish(axes: "Axes", *, legend: bool) -> None:
    """Axes without a frame, a faint grid, whole steps."""
    from matplotlib.ticker import MaxNLocator

    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color=INK, alpha=0.12, linewidth=0.8)
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if legend:
        axes.legend(frameon=False)
