"""What has changed in a recipe since the checkpoint that a run resumes from."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from litgpt.errors import UserError
from litgpt.recipe.from_yaml import read_yaml
from litgpt.recipe.to_yaml import to_plain
from litgpt.recipe.training import Training

FIXED = {"preference.reference": "the reference in the checkpoint is that of the run's start"}
"""Settings that only a new run can change, and why."""
STATE_FORMATS = ("optimizer.rank", "optimizer.proj_type", "optimizer.amsgrad")
"""Settings of optimizers that the state in a checkpoint depends on."""


def describe_changes(recipe: Training, checkpoint: Path) -> str:
    """Name the settings that differ from those in a checkpoint, with both values; empty if none does, or it has none.

    Raises:
        UserError: if one of them cannot change.
    """
    path = checkpoint / "recipe.yaml"
    if not path.is_file():
        return ""
    differences = list(find_differences(read_yaml(str(path)), to_plain(recipe)))
    for key, before, now in differences:
        if key in FIXED:
            raise UserError(
                f"{key}: {format_value(now)} is not the {format_value(before)} of {path}, and {FIXED[key]}; set "
                f"{key}: {format_value(before)}, or start a new run in another out_dir"
            )
        if key in STATE_FORMATS and recipe.checkpoint.load_optimizer and None not in (before, now):
            raise UserError(
                f"{key}: {format_value(now)} is not the {format_value(before)} of {path}, whose optimizer state "
                f"depends on it; set {key}: {format_value(before)}, or checkpoint.load_optimizer: false"
            )
    return ", ".join(f"{key}: {format_value(before)} -> {format_value(now)}" for key, before, now in differences)


def find_differences(before: Any, now: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Find the settings that differ between two recipes: the key and both values, of which one may be missing."""
    if not (isinstance(before, dict) and isinstance(now, dict)):
        if before != now:
            yield key, before, now
    elif before.get("class_path") != now.get("class_path"):
        yield key, before.get("class_path"), now.get("class_path")
    else:
        before, now = before.get("init_args", before), now.get("init_args", now)
        for name in dict.fromkeys([*now, *before]):
            if key or name != "resume":
                yield from find_differences(before.get(name), now.get(name), f"{key}.{name}".strip("."))


def format_value(value: Any) -> str:
    """Format a setting as in YAML."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
