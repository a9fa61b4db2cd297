"""The folders of a run's training checkpoints."""

import re
from pathlib import Path

from litgpt.errors import UserError

STEP_FOLDER = re.compile(r"step-(\d+)")


def get_step_folder(out_dir: Path, step: int) -> Path:
    """The folder of the checkpoint of a step."""
    return out_dir / f"step-{step:08d}"


def list_checkpoints(out_dir: Path) -> list[tuple[int, Path]]:
    """The finished checkpoint folders of a run with their steps, newest first."""
    matches = [(STEP_FOLDER.fullmatch(path.name), path) for path in out_dir.glob("step-*") if path.is_dir()]
    return sorted(((int(match[1]), path) for match, path in matches if match), reverse=True)


def no_checkpoint_error(out_dir: Path) -> UserError:
    """Return the error for `resume: true` without a checkpoint."""
    return UserError(f"resume: true, but {out_dir} holds no checkpoint; use resume: auto to start without one")
