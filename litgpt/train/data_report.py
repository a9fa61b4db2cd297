"""The report on the data of a run in `data_report.json`, in lines for its page."""

from pathlib import Path
from typing import Any

from litgpt.data.read.row_sets import RowReport
from litgpt.errors import UserError
from litgpt.files import read_json_object

DATA_REPORT_FILE = "data_report.json"
DataLines = list[tuple[str, list[str]]]


def read_data_report(path: Path) -> DataLines:
    """Read the report: of each set of rows its name and lines, and those of the padding; empty if there is no report.

    Raises:
        UserError: if the file is not such a report.
    """
    report = read_json_object(path)
    try:
        return [
            (name, [describe_padding(values)] if name == "padding" else describe_rows(values))
            for name, values in report.items()
        ]
    except (TypeError, ValueError, KeyError, AttributeError, ArithmeticError):
        raise UserError(f"{path}: is not a report on data; remove the file") from None


def describe_rows(values: dict[str, Any]) -> list[str]:
    """Describe what a set of rows left out, and the columns that nothing reads, with the first rows left out."""
    report = RowReport.from_dict(values)
    return [line for line in (str(report), report.describe_unread(), *map(str, report.first)) if line]


def describe_padding(values: dict[str, Any]) -> str:
    """Describe the share of padding in all batches."""
    return f"{values['padding'] / values['places']:.1%} of {values['places']:,} tokens"
