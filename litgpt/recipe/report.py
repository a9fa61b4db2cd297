"""The settings of `litgpt report`."""

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Report:
    """Write a self-contained HTML report of a run, or the comparison of several."""

    out_dir: Path
    """Output folder of the run."""
    output: Path | None = None
    """Path of the page; null for report.html in out_dir, or comparison.html if there are others."""
    others: list[Path] = field(default_factory=list)
    """Output folders of other runs to compare it with, at most 7."""
