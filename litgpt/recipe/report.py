"""The settings of `litgpt report`."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Report:
    """Write a self-contained HTML report of a run."""

    out_dir: Path
    """Output folder of the run."""
    output: Path | None = None
    """Path of the report; null for report.html in out_dir."""
