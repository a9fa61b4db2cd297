"""Keep the figures of benchmarks in `record.md`, and say which have fallen by more than 5 %.

    python benchmarks/record.py /tmp/pretrain-benchmark/pretrain-figures.json   # adds its figures
    python benchmarks/record.py                                                 # compares; exits with 1 if one has

Figures are shares of the machine's limit, and ratios to peers that ran in turn with this package, so that a slow hour
of the machine is not taken for a slower package. The newest row of a figure is compared with the best earlier one on
the same host, whose name includes the number of cores and the version of torch. Requires only the standard library.
"""

import json
import os
import platform
import subprocess
import sys
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

RECORD = Path(__file__).with_name("record.md")
TOLERANCE = 0.05


class Row(NamedTuple):
    """A row of the record."""

    day: str
    commit: str
    host: str
    figure: str
    value: str


def main() -> None:
    """Add the figures of the files that are given, then print which figures have fallen."""
    for path in map(Path, sys.argv[1:]):
        add_figures(RECORD, path.stem.removesuffix("-figures"), json.loads(path.read_text()))
    fallen = find_fallen(read_rows(RECORD))
    print("\n".join(fallen) or "no figure has fallen by more than 5 %")
    sys.exit(bool(fallen) and len(sys.argv) == 1)


def add_figures(record: Path, benchmark: str, figures: dict[str, float]) -> None:
    """Append the figures of a benchmark to the table of the record."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=RECORD.parent, check=True, capture_output=True, text=True
    ).stdout.strip()
    with record.open("a", encoding="utf-8") as file:
        for name, value in figures.items():
            row = Row(f"{date.today()}", commit, describe_host(), f"{benchmark} {name}", f"{value:.3f}")
            file.write(f"| {' | '.join(row)} |\n")


def describe_host() -> str:
    """The name of the processor, the number of cores that this process may use, and the version of torch."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if sys.platform == "linux" else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{next(names, platform.processor())}, {cores} cores, torch {version('torch').partition('+')[0]}"


def read_rows(record: Path) -> list[Row]:
    """Read the table of the record, the oldest row first."""
    lines = [line for line in record.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    return [Row(*(cell.strip() for cell in line.strip("|").split("|"))) for line in lines[2:]]


def find_fallen(rows: list[Row]) -> list[str]:
    """Describe the figures whose newest value is more than 5 % worse than the best earlier one of the same host."""
    histories: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        histories.setdefault((row.host, row.figure), []).append(row)
    lines = []
    for (host, figure), history in histories.items():
        *earlier, newest = history
        sign = -1 if "memory" in figure else 1  # lower is better
        best = max(earlier, key=lambda row: sign * float(row.value), default=newest)
        if sign * (float(newest.value) / float(best.value) - 1) < -TOLERANCE:
            lines.append(f"{figure}: {best.value} at {best.commit}, {newest.value} at {newest.commit} ({host})")
    return lines


if __name__ == "__main__":
    main()
