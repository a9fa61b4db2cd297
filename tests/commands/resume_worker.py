"""Runs of finetuning one after the other in one process, since most of a short run's time is its start."""

import os
from pathlib import Path

from litgpt.cli import main
from litgpt.parallel.reduce import all_gather_objects
from litgpt.parallel.strategy import is_rank_zero
from litgpt.train import run


def worker(folders: list[Path], command: str = "finetune_lora") -> int:
    """Run the recipe in each folder, then go on from its checkpoint of the middle in a folder beside it."""
    run.exit_process = lambda _code: None  # this process has more runs to do
    for folder in folders:
        os.chdir(folder)
        if code := main([command, "--config", "recipe.yaml"]):
            return code
        broken = folder.with_name(f"{folder.name}-resumed")
        if is_rank_zero():
            (broken / "out").mkdir()
            (folder / "out" / "step-00000010").rename(broken / "out" / "step-00000010")
        all_gather_objects(None)  # sees it
        os.chdir(broken)
        if code := main([command, "--config", "recipe.yaml", "--resume", "true"]):
            return code
    return 0


def run_all(folders: list[Path], command: str) -> int:
    """Run the recipe in each folder."""
    run.exit_process = lambda _code: None
    for folder in folders:
        os.chdir(folder)
        if code := main([command, "--config", "recipe.yaml"]):
            return code
    return 0
