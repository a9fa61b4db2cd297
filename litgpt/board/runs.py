"""The runs below a folder: where they are, what they have written, and how large their checkpoints are."""

import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from litgpt.board.metrics_file import MetricsFile, read_last_figures
from litgpt.board.run_processes import OUTPUT, PROCESS_FILE, PROCESS_FOLDER
from litgpt.errors import UserError
from litgpt.files import read_json_object
from litgpt.recipe.from_yaml import read_yaml
from litgpt.store.step_folders import STEP_FOLDER
from litgpt.train.charts import COLORS, Rows
from litgpt.train.comparison import ComparedRun, compare_runs
from litgpt.train.data_report import DATA_REPORT_FILE
from litgpt.train.history import FILE_NAME, list_versions
from litgpt.train.profiler import PROFILE_SUMMARY
from litgpt.train.report import describe_report, read_files
from litgpt.train.router_training import LOAD_FILE
from litgpt.train.run_process import is_on_this_machine
from litgpt.train.run_record import RECORD_FILE

MAX_DEPTH = 6
FIND_SECONDS = 1.0  # how long a list of folders is used again
OTHER_FOLDERS = {"logs", "final", "adapter", "profile", "tokenizer"}
"""Folders in that of a run that hold no further runs."""
RUN_FILES = (RECORD_FILE, "recipe.yaml", "samples.jsonl", LOAD_FILE, DATA_REPORT_FILE, PROFILE_SUMMARY)
"""The files of the page of a run, besides its metrics and its output."""
READ_FILES = (*RUN_FILES, "logs/csv", PROCESS_FOLDER)
MAX_SAMPLES = 50
SILENT_SECONDS = 60


class UnknownRunError(UserError):
    """A name that is not the name of a run below the folder."""


class RunFolders:
    """The runs below a folder, by their paths in it. Files that lead out of the folder are not read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self._found: tuple[float, dict[str, Path]] = (-FIND_SECONDS, {})
        self._metrics: dict[Path, MetricsFile] = {}
        self._summaries: dict[Path, tuple[tuple[int, ...], dict[str, Any]]] = {}

    def find_all(self) -> dict[str, Path]:
        """Find the folders of all runs."""
        if time.monotonic() - self._found[0] < FIND_SECONDS:
            return self._found[1]
        runs: dict[str, Path] = {}
        for parent, names, files in os.walk(self.folder):  # which does not follow symbolic links
            path = Path(parent)
            if (
                RECORD_FILE in files
                or PROCESS_FOLDER in names
                or ("logs" in names and (path / "logs" / "csv").is_dir())
            ):
                runs[path.relative_to(self.folder).as_posix()] = path
            is_deep = len(path.relative_to(self.folder).parts) >= MAX_DEPTH
            names[:] = [] if is_deep else sorted(name for name in names if may_hold_runs(name))
        self._found = (time.monotonic(), runs)
        return runs

    def find(self, name: str) -> Path:
        """Find the folder of a run.

        Raises:
            UnknownRunError: if there is no run of this name.
        """
        if name not in self.find_all():
            self._found = (-FIND_SECONDS, {})  # it may have just been made
        if (folder := self.find_all().get(name)) is None:
            raise UnknownRunError(f"run: {name[:200]!r} is not a run in {self.folder}; choose one of the list")
        for file in READ_FILES:
            self.check_inside(folder / file)
        return folder

    def check_inside(self, path: Path) -> None:
        """Check that a path is inside of the folder, and not a link out of it.

        Raises:
            UserError: naming the path.
        """
        if not path.resolve().is_relative_to(self.folder):
            raise UserError(f"{path}: leads out of {self.folder}; replace the link by the file")

    def find_metrics(self, folder: Path) -> Path | None:
        """Find the newest metrics file of a run; None if it has none."""
        root = folder / "logs" / "csv"
        paths = (root / f"version_{number}" / FILE_NAME for number in reversed(list_versions(root)))
        if (path := next((path for path in paths if path.exists()), None)) is not None:
            self.check_inside(path)
        return path

    def read_rows(self, folder: Path) -> tuple[Rows, MetricsFile | None]:
        """Read the metrics of a run, of which only what is new is read again."""
        if (path := self.find_metrics(folder)) is None:
            return [], None
        file = self._metrics.setdefault(path, MetricsFile(path))
        file.read()
        return file.rows, file

    def summarize(self, name: str, folder: Path) -> dict[str, Any]:
        """The row of a run in the list: what it is, its last figures and its curve."""
        try:
            self.find(name)
            path = self.find_metrics(folder)
            process_file = folder / PROCESS_FOLDER / PROCESS_FILE
            stamp = stamp_files(folder / RECORD_FILE, process_file, *([path] if path else []))
            if folder in self._summaries and self._summaries[folder][0] == stamp:
                return self._summaries[folder][1]
            record, process = read_json_object(folder / RECORD_FILE), read_json_object(process_file)
            last, curve = read_last_figures(path) if path else ({}, [])
        except (UserError, OSError) as error:
            return {"name": name, "problem": str(error), "last": {}, "curve": []}
        about = {
            "name": name,
            "last": replace_infinite(last),
            "curve": curve,
            "updated": max(stamp[1::2], default=0) / 1e9,
        }
        summary = {**about, **describe_record(record, process)}
        self._summaries[folder] = (stamp, summary)
        return summary

    def describe(self, name: str) -> dict[str, Any]:
        """The page of a run: its report, its checkpoints, and what of its files cannot be read.

        Raises:
            UnknownRunError: if there is no run of this name.
        """
        folder = self.find(name)
        problems: list[str] = []
        files = read_files(folder, problems)
        rows, metrics = self.read_rows(folder)
        if metrics is not None and metrics.invalid:
            problems.append(f"{metrics.path.relative_to(self.folder)}: {metrics.invalid} lines are not rows of metrics")
        report = describe_report(files, rows)
        report["samples"] = report["samples"][-MAX_SAMPLES:]
        if metrics is not None and metrics.rows_per_mean > 1:
            problems.append(f"Each point is the mean of {metrics.rows_per_mean} rows; `litgpt report` has all spikes.")
        checkpoints = list_sizes(folder)
        return replace_infinite(report | {"name": name, "problems": problems, "checkpoints": checkpoints})

    def compare(self, names: Sequence[str]) -> dict[str, Any]:
        """The page that compares several runs.

        Raises:
            UserError: if there are too many, or one is not a run.
        """
        if not 2 <= len(names) <= len(COLORS):
            raise UserError(f"run: {len(names)} cannot be compared; choose from 2 to {len(COLORS)} runs")
        runs, problems = [], []
        for name in names:
            folder = self.find(name)
            try:
                recipe = read_yaml(str(folder / "recipe.yaml")) if (folder / "recipe.yaml").is_file() else {}
            except UserError as error:
                recipe = {}
                problems.append(str(error))
            runs.append(ComparedRun(name, self.read_rows(folder)[0], recipe))
        return replace_infinite(compare_runs(runs) | {"problems": problems})

    def stamp(self, names: Sequence[str]) -> tuple[int, ...]:
        """Sizes and times of the files of runs; different after any of them has changed."""
        stamp: tuple[int, ...] = ()
        for name in names:
            folder = self.find(name)
            metrics = self.find_metrics(folder)
            others = [folder / file for file in (*RUN_FILES, f"{PROCESS_FOLDER}/{OUTPUT}")]
            stamp += stamp_files(folder, *others, *([metrics] if metrics else []))
        return stamp


def may_hold_runs(name: str) -> bool:
    """Whether to look for runs in a folder of this name."""
    return not (
        name in OTHER_FOLDERS or name.startswith(".") or STEP_FOLDER.fullmatch(name) or name.endswith(".partial")
    )


def stamp_files(*paths: Path) -> tuple[int, ...]:
    """Size and time in nanoseconds of each file that exists."""
    statuses = (path.stat() for path in paths if path.exists())
    return tuple(number for status in statuses for number in (status.st_size, status.st_mtime_ns))


def describe_record(record: dict[str, Any], started: dict[str, Any]) -> dict[str, Any]:
    """What the list shows of the record of a run; empty texts for what it does not have.

    Args:
        started: the process that a board has started for it, if any.
    """
    empty = {"task": "", "model": "", "steps": None, "host": "", "end": ""}
    try:
        start = record["starts"][-1]
        return {
            "task": str(record["task"]),
            "model": str(record["model"]["name"]),
            "steps": record.get("steps"),
            "host": str(start["host"]),
            "end": str((start.get("end") or {}).get("reason", "")),
            "lost": "killed" if is_on_this_machine(start.get("process") or {}) else "",
        }
    except (KeyError, IndexError, TypeError, AttributeError):
        return {**empty, "lost": "failed" if not record and is_on_this_machine(started) else ""}


def name_state(summary: dict[str, Any], *, is_running: bool) -> str:
    """The state of a run in a word: running, finished, ended, failed before its first step, killed, or silent.

    Args:
        is_running: whether its process is known to be one of this machine that has not ended.
    """
    if is_running:
        return "running"
    if summary.get("end"):
        steps = summary["steps"]
        return "finished" if steps is not None and summary["last"].get("step", 0) >= steps else "ended"
    if summary.get("lost"):
        return str(summary["lost"])
    return "running" if time.time() - summary.get("updated", 0) < SILENT_SECONDS else "silent"


def list_sizes(folder: Path) -> list[dict[str, Any]]:
    """The checkpoints and the finished models of a run, with their sizes in bytes; the newest first."""
    sizes = []
    for path in sorted(folder.iterdir(), reverse=True):
        is_model = path.name in ("final", "adapter")
        if path.is_dir() and not path.is_symlink() and (is_model or STEP_FOLDER.fullmatch(path.name)):
            files = [file.lstat() for file in path.rglob("*")]
            sizes.append({"name": path.name, "bytes": sum(status.st_size for status in files), "files": len(files)})
    return sizes


def replace_infinite(value: Any) -> Any:
    """Replace numbers that JSON does not have by None."""
    if isinstance(value, dict):
        return {key: replace_infinite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [replace_infinite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
