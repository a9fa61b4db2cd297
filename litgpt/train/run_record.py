"""The record of a run in `run.json`: its model, data, machine and software, and how each start of it ended."""

import platform
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from litgpt.errors import UserError
from litgpt.files import read_json_object, write_json
from litgpt.parallel.precision import default_precision
from litgpt.parallel.strategy import is_rank_zero
from litgpt.recipe.commands import COMMANDS
from litgpt.recipe.to_yaml import find_changes, get_class_name, read_changed_arguments
from litgpt.train.header import count_parameters
from litgpt.train.loop import Loop
from litgpt.train.run_process import describe_own_process
from litgpt.train.setup import Run
from litgpt.version import __version__

RECORD_FILE = "run.json"


@contextmanager
def record_run(run: Run, loop: Loop) -> Iterator[None]:
    """Record the start of a run on entry, and the step and the reason of its end on exit; on the first rank only.

    A process that is killed records no end.
    """
    if not is_rank_zero():
        yield
        return
    path = run.recipe.out_dir / RECORD_FILE
    record = describe_run(run)
    start = describe_start(run, loop.step)
    record["starts"] = [*(read_starts(path) if run.progress else []), start]
    write_json(path, record)
    try:
        yield
    except BaseException as error:
        start["end"] = describe_end(loop.step, format_error(error))
        write_json(path, record)
        raise
    start["end"] = describe_end(loop.step, loop.reason)
    write_json(path, record)


def read_starts(path: Path) -> list[dict[str, Any]]:
    """Read the starts of a run that is resumed; empty if it has no record."""
    return list(read_json_object(path).get("starts", [])) if path.is_file() else []


def read_last_start(path: Path) -> dict[str, Any]:
    """Read the last start of a run; empty if it has no record, or one of another form.

    Raises:
        UserError: if the file is not JSON.
    """
    starts = read_json_object(path).get("starts")
    start = starts[-1] if isinstance(starts, list) and starts else {}
    return start if isinstance(start, dict) else {}


def describe_run(run: Run) -> dict[str, Any]:
    """Describe the task, model, data and changed settings of a run, as JSON values."""
    spec, data = run.spec, run.data
    total, trained = count_parameters(spec)
    return {
        "task": spec.task,
        "command": find_command_name(type(run.recipe).__name__),
        "model": {"name": spec.config.name, "parameters": total, "trained_parameters": trained},
        "tuner": get_class_name(spec.tuner) if spec.tuner else None,
        "weights": str(spec.weights) if spec.weights else None,
        "loss": spec.preference.describe() if spec.preference else None,
        "data": {
            "source": get_class_name(spec.data),
            "settings": read_changed_arguments(spec.data),
            "samples": data.train.samples_per_epoch,
            "tokens": getattr(data.train, "tokens_per_epoch", None),  # a user's own stream may not have it
            "validation_samples": data.validation.samples_per_epoch if data.validation else 0,
            "sequence_length": data.sequence_length * spec.data.answers_per_sample,
        },
        "steps": run.steps,
        "changes": find_changes(run.recipe),
    }


def find_command_name(recipe: str) -> str | None:
    """The first command whose recipe has a class of this name; None if there is none."""
    return next((name for name, command in COMMANDS.items() if command.recipe.endswith(f":{recipe}")), None)


def describe_start(run: Run, step: int) -> dict[str, Any]:
    """Describe the machine and software of one start of a run, as JSON values."""
    device, mesh = run.train_state.device, run.train_state.mesh
    return {
        "date": get_date(),
        "step": step,
        "host": socket.gethostname(),
        "process": describe_own_process(),  # of the first rank
        "system": f"{platform.system()} {platform.machine()}",
        "processes": run.ranks,
        "layout": {} if mesh is None else asdict(mesh.dims),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "precision": run.recipe.precision or default_precision(),
        "versions": {
            "litgpt": __version__,
            "torch": str(torch.__version__),
            "Python": platform.python_version(),
        },
    }


def describe_end(step: int, reason: str) -> dict[str, Any]:
    """Describe the end of one start of a run, as JSON values."""
    return {"date": get_date(), "step": step, "reason": reason}


def format_error(error: BaseException) -> str:
    """Format the error that ended a run: a message to the user as it is, any other with its type."""
    name, text = type(error).__name__, str(error)
    return text if isinstance(error, UserError) else f"{name}: {text}" if text else name


def get_date() -> str:
    """The current date and time with the offset to UTC, in ISO 8601."""
    return datetime.now().astimezone().isoformat(timespec="seconds")
