"""A process that finetunes tiny models on good rows, then on bad ones, and prints its peak memory after each."""

import sys
from pathlib import Path

from litgpt.cli import main

SETTINGS = {
    "freeze.aligner": "false",
    "data": "Conversations",
    "data.val_fraction": "0",
    "data.num_workers": "0",
    "data.on_error": "drop",
    "train.global_batch_size": "8",
    "train.micro_batch_size": "4",
    "train.lr_warmup_steps": "2",
    "train.epochs": "1",
    "eval.max_new_tokens": "null",
    "precision": "32-true",
    "devices": "1",
    "logger_name": "csv",
}


def finetune(tower: str, model: Path, rows: Path, out: Path) -> int:
    """Finetune on all rows once; returns the exit code."""
    settings = SETTINGS | {f"freeze.{tower}": "false"}
    settings |= {"data.sources": str(rows), "data.cache_dir": str(out / "cache"), "out_dir": str(out)}
    return main(
        ["finetune_full", str(model), *(word for key, value in settings.items() for word in (f"--{key}", value))]
    )


def read_peak() -> int:
    """The largest resident memory of this process so far, in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) // 1024 for line in lines if line.startswith("VmHWM"))


if __name__ == "__main__":
    for number in range(1, len(sys.argv), 3):
        tower, model, rows = sys.argv[number], *map(Path, sys.argv[number + 1 : number + 3])
        code = finetune(tower, model, rows, model.parent / f"out-{rows.parent.name}")
        print(f"ended with {code}; peak: {read_peak()} MB", flush=True)
