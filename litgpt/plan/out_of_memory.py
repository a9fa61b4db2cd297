"""The end of a run without enough memory: what its step needs memory for, and the setting that saves most."""

import gc
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from litgpt.errors import UserError
from litgpt.files import write_text
from litgpt.parallel.heartbeat import report_lost_ranks, running
from litgpt.parallel.memory_errors import is_out_of_memory
from litgpt.phases import phase
from litgpt.plan.table import PART_NAMES
from litgpt.recipe.to_yaml import dump_recipe
from litgpt.recipe.training import Training

EXPLANATION_SECONDS = 120  # after which a run ends without its plan
LARGEST = 3  # items of the plan that are named
REQUEST = re.compile(r"tried to allocate ([\d.]+) (bytes|[KMGT]iB)", re.IGNORECASE)
NO_CURE = "use more devices, or a smaller train.max_seq_length"


@contextmanager
def explain_out_of_memory(command: str, recipe: Training) -> Iterator[None]:
    """Explain why there is not enough memory for a run, if that is the error with which it ends.

    Args:
        command: that has started the run.

    Raises:
        UserError: on the first of several ranks without memory, which ends the others; with what is planned to take
            most of it, and the changed setting that saves most.
    """
    with report_lost_ranks():
        problem = ""
        try:
            yield
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            problem = describe_request(str(error))
            traceback.clear_frames(error.__traceback__)  # which hold the model
        if problem:  # the error, which also holds them, is deleted by now
            raise UserError(f"{problem}; {find_cause(command, recipe)}; earlier checkpoints are intact")


def find_cause(command: str, recipe: Training) -> str:
    """Free what a run that has ended has left, and explain it; on another rank than the first one, wait for that."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    if running and not running[0].claim("out of memory"):
        time.sleep(2 * EXPLANATION_SECONDS)  # until the first one ends this process
    with phase("planning what would need less memory"):
        return plan_in_process(command, recipe)


def describe_request(message: str) -> str:
    """What was asked of an allocator, by its error."""
    match = REQUEST.search(message)
    if match is None:
        return "out of memory"
    size = f"{float(match[1]) / 2**30:.2f} GiB" if match[2].lower() == "bytes" else f"{match[1]} {match[2]}"
    return f"out of memory, when {size} more were needed"


def plan_in_process(command: str, recipe: Training) -> str:
    """Explain a run by its plan, which another process makes: this one may have a process group, and little time."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yaml"
        write_text(path, dump_recipe(recipe))
        words = [sys.executable, "-m", "litgpt", "plan", command, "--config", str(path), "--savings", "--json"]
        try:
            finished = subprocess.run(
                words,
                env={**os.environ, "LOCAL_RANK": "0"},  # of another rank, it would print nothing
                capture_output=True,
                text=True,
                timeout=EXPLANATION_SECONDS,
                check=False,
            )
        except (subprocess.TimeoutExpired, OSError) as error:
            return f"no plan was made ({type(error).__name__}); see litgpt plan {command}"
    if finished.returncode:
        last = (finished.stderr.strip().splitlines() or [f"exit status {finished.returncode}"])[-1]
        return f"no plan was made ({last.removeprefix('litgpt: error: ')})"
    return explain_plan(json.loads(finished.stdout))


def explain_plan(plan: Mapping[str, Any]) -> str:
    """Explain what takes most of the memory of a run, and which changed setting saves most.

    Args:
        plan: JSON values of `litgpt plan --savings`.
    """
    worst, savings = plan["worst"], plan["savings"]
    parts = sorted(((size, name) for name, size in worst["parts"].items() if name in PART_NAMES), reverse=True)
    largest = ", ".join(f"{PART_NAMES[name].lower()} {size:.2f}" for size, name in parts[:LARGEST] if size)
    need = f"rank {worst['rank']} is planned to need {worst['peak_gib']:.2f} GiB, most of it for {largest} GiB"
    if not savings:
        return f"{need}; {NO_CURE}"
    best = savings[0]
    return f"{need}; set {best['key']}: {best['value']}, with which it is {best['memory']:.2f} GiB"
