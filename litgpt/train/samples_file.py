"""The samples that a run has generated, one line of JSON each."""

import json
from pathlib import Path

from litgpt.files import write_text


def remove_samples_after(path: Path, step: int) -> None:
    """Remove the samples generated after `step`, from which a run resumes; all samples for a new run (step 0)."""
    if path.is_file():
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("\n") and step and json.loads(line)["step"] <= step]
        write_text(path, "".join(kept))
