"""An HTML report of a run in a single file, without external resources."""

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from litgpt.data.read.media import PNG_URI
from litgpt.errors import UserError
from litgpt.files import read_json_object, write_text
from litgpt.recipe.to_yaml import format_yaml
from litgpt.recipe.train import BestArgs, GuardArgs
from litgpt.train import history
from litgpt.train.best_metric import BestMetric
from litgpt.train.charts import Rows, build_charts, find_speed_column, get_finite_values
from litgpt.train.console import format_duration, format_trained
from litgpt.train.data_report import DATA_REPORT_FILE, DataLines, read_data_report
from litgpt.train.guard import Guard
from litgpt.train.profiler import PROFILE_SUMMARY
from litgpt.train.router_training import LOAD_FILE
from litgpt.train.run_record import RECORD_FILE


def write_report(out_dir: Path, output: Path | None = None) -> Path:
    """Write the report of the newest run in `out_dir` and return its path.

    Raises:
        UserError: if the folder holds no metrics, or a file in it is not valid.
    """
    path, rows = read_newest_metrics(out_dir)
    output = output or out_dir / "report.html"
    files = read_files(out_dir)
    values = describe_report(files, rows) | {"metrics": path.relative_to(out_dir)}
    values["questions"] = group_by_question(files.samples)
    render_page(output, "report.html.j2", values)
    return output


@dataclass(frozen=True)
class RunFiles:
    """What the files of a run say, besides its metrics.

    Attributes:
        name: of its folder.
        record: empty if it has none.
        recipe: every setting in YAML; None if it has none.
        profile: the summary of its profile in Markdown; None if it has none.
    """

    name: str
    record: dict[str, Any]
    recipe: str | None
    guard: GuardArgs
    best: BestArgs | None
    samples: list[dict[str, Any]]
    load: list[tuple[int, list[tuple[float, float]]]]
    data: DataLines
    profile: str | None


def read_files(out_dir: Path, problems: list[str] | None = None) -> RunFiles:
    """Read the files of a run.

    Args:
        problems: where the errors of files are appended that cannot be read, and are left out; None to raise them.

    Raises:
        UserError: if a file is not valid.
    """

    def read(parse: Callable[[Any], Any], source: Any, default: Any) -> Any:
        try:
            return parse(source)
        except (UserError, OSError) as error:
            if problems is None:
                raise
            problems.append(str(error))
            return default

    recipe = read(read_text, out_dir / "recipe.yaml", None)
    guard, best = read(load_settings, recipe, (GuardArgs(), None))
    return RunFiles(
        name=out_dir.name or str(out_dir),
        record=read(read_record, out_dir / RECORD_FILE, {}),
        recipe=recipe,
        guard=guard,
        best=best,
        samples=read(read_samples, out_dir / "samples.jsonl", []),
        load=read(read_load, out_dir / LOAD_FILE, []),
        data=read(read_data_report, out_dir / DATA_REPORT_FILE, []),
        profile=read(read_text, out_dir / PROFILE_SUMMARY, None),
    )


def describe_report(files: RunFiles, rows: Rows) -> dict[str, Any]:
    """The values of the report of a run with these metrics: titles, figures, charts, events, texts and recipe."""
    record, best = files.record, find_best(rows, files.best)
    parts = [record["task"], files.name, format_dates(record), get_end_reason(record)] if record else []
    return {
        "title": record["model"]["name"] if record else files.name,
        "lead": " · ".join(parts),
        "tiles": build_tiles(rows, find_skipped(rows), best),
        "facts": build_facts(record),
        "page": build_charts(rows, list_marks(record, best)),
        "events": find_events(rows, files.guard, record, best),
        "samples": files.samples,
        "load": files.load,
        "data": files.data,
        "profile": files.profile,
        "changes": format_yaml(record.get("changes", {})) if record else "",
        "recipe": files.recipe,
    }


def render_page(output: Path, template: str, values: Mapping[str, Any], folder: Path | None = None) -> None:
    """Write a page from a template and its values.

    Args:
        template: a file in `folder`, or in that of this module, whose files it may include.
    """
    from jinja2 import Environment, FileSystemLoader

    templates = Path(__file__).parent
    loader = FileSystemLoader([templates] if folder is None else [folder, templates])
    environment = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    write_text(output, environment.get_template(template).render(values))


def list_metrics_files(out_dir: Path) -> list[Path]:
    """List the metrics files in the folder of a run, the newest one last."""
    root = out_dir / "logs" / "csv"
    paths = (root / f"version_{number}" / history.FILE_NAME for number in history.list_versions(root))
    return [path for path in paths if path.exists()]


def read_newest_metrics(out_dir: Path) -> tuple[Path, Rows]:
    """Find and read the newest metrics file of a run."""
    if not out_dir.is_dir():
        raise UserError(f"out_dir: {out_dir} is not a folder; give the out_dir of a run that was trained")
    existing = list_metrics_files(out_dir)
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
    """Read the samples generated during training, oldest first: dicts of step, prompt, text and drawn images.

    Those about images have the number of their `question`, others None, and `target`, the answer in the data; the
    images that were `seen` are in the first of each process.

    Text after the last line end is a line that is being written, and left out.
    """
    samples = []
    for number, line in enumerate((read_text(path) or "").split("\n")[:-1], start=1):
        try:
            row = json.loads(line)
            continuation = row["text"].removeprefix(row["prompt"])
            sample = {"step": int(row["step"]), "prompt": row["prompt"], "text": continuation}
            for name in ("images", "seen"):
                sample[name] = [image for image in row.get(name, []) if image.startswith(PNG_URI)]
            question = row.get("question")
            sample |= {"question": None if question is None else int(question), "target": str(row.get("target", ""))}
            samples.append(sample)
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{path}: line {number} is not JSON with step, prompt and text; remove the line") from None
    return samples


def group_by_question(samples: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The questions about images, with the images, the answer in the data, and all samples, the newest first."""
    questions: dict[int, dict[str, Any]] = {}
    for sample in samples:
        if sample["question"] is not None:
            about = questions.setdefault(sample["question"], {"seen": [], "answers": []})
            about |= {"prompt": sample["prompt"], "target": sample["target"], "seen": sample["seen"] or about["seen"]}
            about["answers"] = [sample, *about["answers"]]
    return [questions[number] for number in sorted(questions)]


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


def build_tiles(rows: Rows, skips: list[tuple[int, int]], best: BestMetric) -> list[tuple[str, str]]:
    """Name and value of the figures at the top of the page."""

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
        ("Tokens/s", format_column(find_speed_column(rows), "{:,.0f}".format, statistics.median)),
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
