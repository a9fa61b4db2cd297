"""Tiny training runs: their text, their recipe, and the losses that they log."""

import csv
import json
from pathlib import Path
from typing import Any

SHAPE = {
    "block_size": 32,
    "padded_vocab_size": 320,
    "n_layer": 2,
    "n_head": 2,
    "n_embd": 16,
    "intermediate_size": 24,
    "rotary_percentage": 1.0,
    "parallel_residual": False,
    "bias": False,
    "norm_class_name": "RMSNorm",
    "mlp_class_name": "LLaMAMLP",
}


def write_text(folder: Path, documents: int = 4) -> Path:
    """Write a few text files, the first of which is for validation, and return their folder."""
    folder.mkdir(parents=True, exist_ok=True)
    text = folder / "text"
    text.mkdir(exist_ok=True)
    for number in range(documents):
        words = (f"word{(number * 7 + position * position) % 97}" for position in range(600))
        (text / f"{number}.txt").write_text(" ".join(words), encoding="utf-8")
    return text


def write_recipe(folder: Path, **changes: Any) -> Path:
    """Write `<folder>/recipe.yaml`: 12 steps on the files of `write_text`, and changes such as train__max_steps=3."""
    recipe: dict[str, Any] = {
        "model_name": "toy",
        "model_config": dict(SHAPE),
        "out_dir": "out",
        "precision": "32-true",
        "data": {"class_path": "TextFiles", "init_args": {"train_data_path": "text", "num_workers": 0}},
        "tokenizer": {"kind": "bytes"},
        "train": {
            "global_batch_size": 8,
            "micro_batch_size": 2,
            "max_steps": 12,
            "lr_warmup_steps": 2,
            "max_norm": 1.0,
            "save_interval": 2,
            "min_lr": 1e-4,
        },
        "eval": {"interval": 100, "max_iters": 2},
        "optimizer": {"class_path": "AdamW", "init_args": {"lr": 1e-2, "weight_decay": 0.1}},
        "devices": 1,
        "logger_name": "csv",
    }
    for key, value in changes.items():
        group = recipe
        *parents, last = key.split("__")
        for parent in parents:
            group = group.setdefault(parent, {})
        group[last] = value
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(recipe), encoding="utf-8")  # JSON is YAML
    return path


def read_losses(folder: Path) -> dict[int, float]:
    """The training loss by step in the newest log of a run in `<folder>/out`."""
    logs = sorted((folder / "out" / "logs" / "csv").glob("version_*"), key=lambda path: int(path.name.split("_")[1]))
    with (logs[-1] / "metrics.csv").open() as file:
        return {int(float(row["step"])): float(row["loss"]) for row in csv.DictReader(file) if row["loss"]}
