"""The metrics file of a run: one CSV, a row for every logged step, that goes on where it was cut.

Rows are appended whole and at once. A column that turns up later is added to the header by rewriting the file whole; a
last line that was cut by a kill is dropped when the file is opened again.
"""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from litgpt.errors import UserError
from litgpt.files import write_text

FILE_NAME = "metrics.csv"


def list_versions(root: Path) -> list[int]:
    """List the numbers N of the folders `version_N` in `root`, ascending."""
    names = (path.name.removeprefix("version_") for path in root.glob("version_*") if path.is_dir())
    return sorted(int(name) for name in names if name.isdecimal())


def choose_version(root: Path, *, resumed: bool) -> int:
    """The N of the folder `version_N` to log into: the newest one of a resumed run, otherwise a new one."""
    taken = list_versions(root)
    if resumed and taken:
        return taken[-1]
    return taken[-1] + 1 if taken else 0


def format_line(values: Sequence[object]) -> str:
    """Format one line of CSV, with its line end."""
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerow(values)
    return buffer.getvalue()


def read_metrics(path: Path) -> tuple[list[str], list[dict[str, float]]]:
    """Read the columns of a metrics file and its rows; a row holds no empty fields.

    Raises:
        UserError: naming the file, and the line, that is missing or holds something other than numbers.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; give the out_dir of a run that was trained") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as a metrics file ({error})") from None
    columns, *table = list(csv.reader(lines[:-1])) or [[]]  # what follows the last line end was cut, or is empty
    if "step" not in columns or len(set(columns)) != len(columns):
        raise UserError(
            f"{path}: line 1 is not the header of a metrics file; it must name each column once, step among them"
        )
    return columns, [parse_row(path, number, columns, values) for number, values in enumerate(table, start=2)]


def parse_row(path: Path, number: int, columns: Sequence[str], values: Sequence[str]) -> dict[str, float]:
    """The numbers of one line by column; empty fields are left out."""
    if len(values) != len(columns):
        raise UserError(f"{path}: line {number} has {len(values)} fields, the header {len(columns)}; remove the line")
    try:
        row = {name: float(value) for name, value in zip(columns, values, strict=True) if value}
    except ValueError as error:
        raise UserError(f"{path}: line {number}: {error}; remove the line") from None
    if not row.get("step", -1) >= 0:
        raise UserError(f"{path}: line {number} has no step; remove the line")
    return row


class History:
    """A metrics file being written."""

    def __init__(self, path: Path, *, resumed_step: int | None = None) -> None:
        """
        Args:
            path: the file; its folder is made with the first row.
            resumed_step: the last optimizer step to keep in a file that is already there; later rows are removed.
        """
        self.path = path
        self.columns: list[str] = []
        if resumed_step is not None and path.exists():
            self.cut(resumed_step)

    def cut(self, last_step: int) -> None:
        """Keep the rows of the steps up to `last_step`."""
        self.columns, _ = read_metrics(self.path)
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
        place = self.columns.index("step")
        kept = [line for line in lines[1:] if line.endswith("\n") and float(line.split(",")[place]) <= last_step]
        write_text(self.path, lines[0] + "".join(kept))

    def append(self, row: Mapping[str, float]) -> None:
        """Write one row; a name that was not seen before becomes a new last column."""
        if new := [name for name in row if name not in self.columns]:
            self.widen(new)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(format_line([row.get(name, "") for name in self.columns]))

    def widen(self, new: Sequence[str]) -> None:
        """Add columns, empty in the rows so far."""
        old = self.path.read_text(encoding="utf-8").splitlines()[1:] if self.columns else []
        self.columns += new
        write_text(self.path, format_line(self.columns) + "".join(line + "," * len(new) + "\n" for line in old))
