"""Tiny runs of 20 steps, and what each logs: losses, gradient norms, and a hash of the final weights.

`python -m tests.golden.golden_runs` regenerates `losses.json`. Do that only in a change that is meant to alter numbers.
"""

import csv
import hashlib
import json
import platform
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file

from tests.processes import join_ranks, run_litgpt, start_ranks
from tests.runs import write_recipe, write_text

GOLDEN = Path(__file__).with_name("losses.json")
BASE = "dense"  # the finetuning runs start from its finished model
EXPERTS = {
    "model_config__mlp_class_name": "LLaMAMoE",
    "model_config__n_expert": 4,
    "model_config__n_expert_per_token": 2,
    "model_config__shared_expert_size": 16,
}
LATENT = {
    "q_lora_rank": None,
    "kv_lora_rank": 12,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
LORA = {"tokenizer": None, "lora_r": 4, "lora_dropout": 0.1, "lora_mlp": True}


class GoldenRun(NamedTuple):
    """A command, the number of its processes, and what its recipe changes in `tests.runs.write_recipe`."""

    command: str
    ranks: int
    changes: dict[str, Any]


RUNS = {
    "dense": GoldenRun("pretrain", 1, {}),
    "dense, bf16-mixed, documents masked": GoldenRun(
        "pretrain", 1, {"precision": "bf16-mixed", "data__init_args__document_mask": True}
    ),
    "experts": GoldenRun("pretrain", 1, EXPERTS),
    "latent attention, recomputed": GoldenRun(
        "pretrain", 1, {"model_config__latent_attention": LATENT, "recompute": {"granularity": "full"}}
    ),
    "tensor 2 x data 2": GoldenRun("pretrain", 4, {"parallel": {"tensor": 2, "data_shard": 2}}),
    "experts, context 2": GoldenRun("pretrain", 2, {**EXPERTS, "parallel": {"context": 2}}),
    "experts, expert 2": GoldenRun("pretrain", 2, {**EXPERTS, "parallel": {"expert": 2}}),
    "pipeline 2": GoldenRun("pretrain", 2, {"parallel": {"pipeline": 2}}),
    "packed LoRA": GoldenRun("finetune_lora", 1, LORA),
    "packed LoRA on nf4": GoldenRun("finetune_lora", 1, {**LORA, "quantize": "torchao.nf4"}),
}


def describe_machine() -> dict[str, str]:
    """What decides which kernels run, and so the last bits of a number."""
    cpu = Path("/proc/cpuinfo")
    fields = dict(line.split(":", 1) for line in cpu.read_text().splitlines() if ":" in line) if cpu.is_file() else {}
    values = {key.strip(): value.strip() for key, value in fields.items()}
    return {
        "machine": platform.machine(),
        "cpu": " ".join(values.get(key, "?") for key in ("vendor_id", "cpu family", "model")),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__.split("+")[0],
    }


def measure_all(folder: Path) -> dict[str, dict[str, Any]]:
    """Run everything, two runs at a time; the finetuning runs wait for their base."""
    with ThreadPoolExecutor(2) as pool:
        results = {BASE: measure(folder, BASE)}
        others = [name for name in RUNS if name != BASE]
        results |= dict(zip(others, pool.map(lambda name: measure(folder, name), others), strict=True))
    return results


def measure(folder: Path, name: str) -> dict[str, Any]:
    """Do one run in `<folder>/<name>`, and give its losses, gradient norms, and the hash of its final weights."""
    run, run_folder = RUNS[name], folder / name
    write_text(run_folder, documents=12)
    changes = {"model_config__block_size": 256, "train__max_seq_length": 32, "train__max_steps": 20, **run.changes}
    path = write_recipe(run_folder, devices=run.ranks, train__save_interval=None, **changes)
    if run.command != "pretrain":
        _write_rows(run_folder, path, base=folder / BASE / "out" / "final")
    codes = join_ranks(
        start_ranks(run_litgpt, run.command, "--config", "recipe.yaml", folder=run_folder, ranks=run.ranks)
    )
    assert codes == [0] * run.ranks, "".join(log.read_text() for log in sorted(run_folder.glob("rank-*.log")))
    with (run_folder / "out/logs/csv/version_0/metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["loss"]]
    columns = {key: [float(row[key]) for row in rows] for key in ("loss", "grad_norm")}
    return {**columns, "weights": hash_weights(run_folder / "out" / "final" / "model.safetensors")}


def _write_rows(folder: Path, recipe_path: Path, base: Path) -> None:
    """Conversations, and the recipe turned into one that finetunes on them, several in a row."""
    rows = [
        {"instruction": f"How many are {number} things?", "output": "There are many. " * (number % 5)}
        for number in range(1, 101)
        if number % 5
    ]
    (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    recipe = json.loads(recipe_path.read_text())
    for key in ("model_name", "model_config", "tokenizer"):
        del recipe[key]
    data = {"sources": "rows.json", "prompt_style": "alpaca", "num_workers": 0, "on_overlong": "truncate_right"}
    data["packing"] = {"enabled": True, "length": 256}
    recipe |= {"checkpoint_dir": str(base), "data": {"class_path": "Conversations", "init_args": data}}
    recipe["train"] |= {"global_batch_size": 2, "micro_batch_size": 1, "max_seq_length": 256}
    recipe_path.write_text(json.dumps(recipe), encoding="utf-8")


def hash_weights(path: Path) -> str:
    """SHA-256 over the names and bytes of a file's tensors, whatever their order."""
    digest = hashlib.sha256()
    for name, tensor in sorted(load_file(path).items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def main() -> None:
    """Write `losses.json`."""
    with tempfile.TemporaryDirectory() as folder:
        results = measure_all(Path(folder))
    GOLDEN.write_text(json.dumps({"machine": describe_machine(), "runs": results}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
