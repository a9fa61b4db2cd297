"""The settings of `litgpt report`."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Report:
    """Write one HTML page about a run, readable without network."""

    out_dir: Path
    """The folder that the run wrote."""
    output: Path | None = None
    """Where the page goes; null for report.html in out_dir."""
