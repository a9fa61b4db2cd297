"""Metrics files that grow: rows that were appended are read, and long runs are condensed to few rows."""

import csv
import math
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from litgpt.errors import UserError
from litgpt.train.charts import MAX_POINTS, Rows, split_validation_rows
from litgpt.train.history import parse_row

CHUNK_BYTES = 2**22
HEADER_BYTES = 2**16
TAIL_BYTES = 2**18  # of the end of a file, in which a summary finds the last validation
SUMMARY_POINTS = 100
LAST_VALUES = ("skipped_steps", "memory_gb")
"""Columns whose last value describes several rows; the mean does for the others."""


class MetricsFile:
    """The rows of a metrics file, at most about 3 * `MAX_POINTS` of training; those of a long run are means.

    Attributes:
        rows_per_mean: the number of rows that are one row here.
        invalid: the number of lines that are not rows.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._forget()

    def _forget(self) -> None:
        self.identity: tuple[int, int, bytes] | None = None
        self.offset, self.number, self.invalid, self.rows_per_mean = 0, 0, 0, 1
        self.columns: list[str] = []
        self.means: Rows = []
        self.latest: Rows = []  # not empty, once there is a row, so that the last row is never a mean
        self.validation: Rows = []

    @property
    def rows(self) -> Rows:
        """The rows of training, and then those of validation, with tokens and time of the training before them."""
        return [*self.means, *self.latest, *self.validation]

    def read(self) -> None:
        """Read the lines since the last call; all lines again if another file has replaced this one."""
        with self.path.open("rb") as file:
            status = os.fstat(file.fileno())
            header = file.readline(HEADER_BYTES)
            identity = (status.st_dev, status.st_ino, header)
            if identity != self.identity or status.st_size < self.offset:
                self._forget()
            if not header.endswith(b"\n"):  # still being written
                return
            if self.identity is None:
                self.identity, self.offset, self.number = identity, len(header), 1
                self.columns = next(csv.reader([header.decode(errors="replace")]), [])
            file.seek(self.offset)
            while (end := (data := file.read(CHUNK_BYTES)).rfind(b"\n") + 1) > 0:
                self.offset += end
                file.seek(self.offset)
                self._add_lines(data[:end].decode(errors="replace").split("\n")[:-1])

    def _add_lines(self, lines: Sequence[str]) -> None:
        rows = []
        for values in csv.reader(line.replace("\0", "") for line in lines):
            self.number += 1
            try:
                rows.append(parse_row(self.path, self.number, self.columns, values))
            except UserError:
                self.invalid += 1
        training, validation = split_validation_rows([*self.latest[-1:], *rows])
        self.validation += validation
        for row in training[len(self.latest[-1:]) :]:
            if len(self.latest) == self.rows_per_mean:
                self.means.append(average_rows(self.latest))
                self.latest = []
            self.latest.append(row)
            if len(self.means) == 2 * MAX_POINTS:
                self.means = [average_rows(self.means[place : place + 2]) for place in range(0, len(self.means), 2)]
                self.rows_per_mean *= 2


def average_rows(rows: Rows) -> dict[str, float]:
    """One row for several: the means of their finite values."""
    if len(rows) == 1:
        return rows[0]
    average = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        values = [value for row in rows if math.isfinite(value := row.get(name, math.nan))]
        if values:
            average[name] = values[-1] if name in LAST_VALUES else statistics.fmean(values)
    return average


class Summary(NamedTuple):
    """A few numbers of a metrics file, which are read without reading all of it.

    Attributes:
        last: the last value of each column near the end of the file.
        curve: steps and losses of rows at equal distances in the file.
    """

    last: dict[str, float]
    curve: list[tuple[float, float]]


def read_last_figures(path: Path) -> Summary:
    """Read the summary of a metrics file; lines that are not rows are left out."""
    with path.open("rb") as file:
        header = file.readline(HEADER_BYTES)
        columns = next(csv.reader([header.decode(errors="replace").replace("\0", "")]), [])
        size = os.fstat(file.fileno()).st_size
        start = max(len(header), size - TAIL_BYTES)
        file.seek(start)
        lines = file.read().split(b"\n")[:-1]
        last = find_last_values(lines[start > len(header) :], columns)
        curve = []
        for place in range(SUMMARY_POINTS):
            file.seek(len(header) + (size - len(header)) * place // SUMMARY_POINTS)
            if place:
                file.readline(HEADER_BYTES)
            for _ in range(2):  # a row of validation has no loss
                row = parse_line(file.readline(HEADER_BYTES), columns)
                if math.isfinite(row.get("loss", math.nan)):
                    curve.append((row["step"], row["loss"]))
                    break
        if math.isfinite(last.get("loss", math.nan)):
            curve.append((last["step"], last["loss"]))
    return Summary(last, list(dict.fromkeys(curve)))


def find_last_values(lines: Sequence[bytes], columns: Sequence[str]) -> dict[str, float]:
    """The values of the last row of training, and the loss of the last validation."""
    last: dict[str, float] = {}
    place = columns.index("val_loss") if "val_loss" in columns else None
    for line in reversed(lines):
        values = line.split(b",", -1 if place is None else place + 1)
        if "loss" not in last or (place is not None and len(values) > place and values[place].strip()):
            last = parse_line(line, columns) | last
        if "loss" in last and (place is None or "val_loss" in last):
            break
    return last


def parse_line(line: bytes, columns: Sequence[str]) -> dict[str, Any]:
    """Parse a line; empty if it is not a row."""
    try:
        return parse_row(Path(), 0, columns, line.decode().strip().split(","))
    except (UserError, UnicodeDecodeError):
        return {}
