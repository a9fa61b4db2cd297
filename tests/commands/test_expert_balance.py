"""Experts trained on Python's documentation: balance losses and bias updates spread the load, at no higher loss."""

import csv
import json
from pathlib import Path

import pytest

from litgpt import cli

RECIPE = {
    "model_name": "small-moe",
    "model_config": {
        "n_layer": 2,
        "n_head": 2,
        "n_embd": 64,
        "block_size": 128,
        "padded_vocab_size": 1024,
        "intermediate_size": 128,
        "moe_intermediate_size": 32,
        "n_expert": 8,
        "n_expert_per_token": 2,
        "mlp_class_name": "LLaMAMoE",
        "router_softmax": "before_top_k",
        "norm_topk_prob": True,
        "norm_class_name": "RMSNorm",
        "rotary_percentage": 1.0,
        "parallel_residual": False,
        "bias": False,
    },
    "tokenizer": {"kind": "bpe", "vocab_size": 1024},
    "train": {
        "global_batch_size": 16,
        "micro_batch_size": 16,
        "max_steps": 300,
        "lr_warmup_steps": 20,
        "max_seq_length": 128,
        "max_norm": 1.0,
    },
    "eval": {"interval": 1000, "max_iters": 20},
    "optimizer": {"class_path": "AdamW", "init_args": {"lr": 2e-3, "weight_decay": 0.1}},
    "precision": "32-true",
    "devices": 1,
    "logger_name": "csv",
}
SETTINGS = {
    "none": (),
    "aux": ("--moe.aux_loss_coeff", "0.01"),
    "bias": ("--model_config.router_correction", "true", "--moe.router_bias_update_rate", "0.004"),
}


def train(folder: Path, text: Path, name: str) -> tuple[float, float]:
    """The load of the most loaded expert relative to the mean, and the validation loss, after 300 steps."""
    data = {"class_path": "PythonDocs", "init_args": {"data_path": str(text)}}
    (folder / "recipe.yaml").write_text(json.dumps({**RECIPE, "data": data}))  # JSON is YAML
    out = folder / name
    assert cli.main(["pretrain", "--config", str(folder / "recipe.yaml"), "--out_dir", str(out), *SETTINGS[name]]) == 0
    rows = list(csv.DictReader((next(out.rglob("metrics.csv"))).open()))
    loads = [float(row["experts/max_load"]) for row in rows if row.get("experts/max_load")]
    losses = [float(row["val_loss"]) for row in rows if row.get("val_loss")]
    return loads[-1], losses[-1]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_balanced_experts_have_an_even_load_and_no_higher_loss(tmp_path: Path, python_docs: Path) -> None:
    load, loss = train(tmp_path, python_docs, "none")
    assert load > 2
    for name in ("aux", "bias"):
        balanced_load, balanced_loss = train(tmp_path, python_docs, name)
        assert balanced_load < 1.5, name
        assert balanced_loss <= loss + 0.02, name
