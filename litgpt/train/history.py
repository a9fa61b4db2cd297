"""The metrics file of a run: one CSV file with a row per logged step, which a resumed run appends to.

Each row is written by a single append. The file is rewritten to add a new column. A last line that was truncated by a
killed process is dropped when the file is opened again.
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
    """Return the N of the folder `version_N` to log into: the newest one for a resumed run, otherwise a new one."""
    versions = list_versions(root)
    if not versions:
        return 0
    return versions[-1] if resumed else versions[-1] + 1


def format_line(values: Sequence[object]) -> str:
    """Format one line of CSV, with its line end."""
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerow(values)
    return buffer.getvalue()


def read_metrics(path: Path) -> tuple[list[str], list[dict[str, float]]]:
    """Read the columns and the rows of a metrics file; empty fields are left out of the rows.

    Raises:
        UserError: if the file does not exist or is not valid; names the file and the line.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; give the out_dir of a run that was trained") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as a metrics file ({error})") from None
    columns, *table = list(csv.reader(lines[:-1])) or [[]]  # text after the last line end is truncated, or empty
    if "step" not in columns or len(set(columns)) != len(columns):
        raise UserError(
            f"{path}: line 1 is not the header of a metrics file; it must name each column once, step among them"
        )
    return columns, [parse_row(path, number, columns, values) for number, values in enumerate(table, start=2)]


def parse_row(path: Path, number: int, columns: Sequence[str], values: Sequence[str]) -> dict[str, float]:
    """Parse the numbers of one line by column; empty fields are left out."""
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
    """A metrics file opened for appending.

    Args:
        path: the file; its folder is created with the first row.
        resumed_step: the last optimizer step to keep in an existing file; later rows are removed.
    """

    def __init__(self, path: Path, *, resumed_step: int | None = None) -> None:
        self.path = path
        self.columns: list[str] = []
        if resumed_step is not None and path.exists():
            self.columns, _ = read_metrics(path)
            header, *lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            index = self.columns.index("step")
            kept = [line for line in lines if line.endswith("\n") and float(line.split(",")[index]) <= resumed_step]
            write_text(path, header + "".join(kept))

    def append(self, row: Mapping[str, float]) -> None:
        """Append one row; names that are not columns yet become the last columns, empty in earlier rows."""
        if new := [name for name in row if name not in self.columns]:
            lines = self.path.read_text(encoding="utf-8").splitlines()[1:] if self.columns else []
            self.columns += new
            write_text(self.path, format_line(self.columns) + "".join(line + "," * len(new) + "\n" for line in lines))
        with self.path.open("a", encoding="utf-8") as file:
            file.write(format_line([row.get(name, "") for name in self.columns]))
