"""Adapters that are exported for vLLM have the same effect by its rules, and what it would ignore is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from litgpt.cli import main
from litgpt.infer.load import open_model
from litgpt.recipe.tuner import LoRA, Tuner, VeRA
from litgpt.store.save_model import save_model_folder
from tests.adapt.models import IDS, build_adapted, copy_base, perturb, save_adapter

PHI3 = {"name": "Phi-3-mini-4k-instruct", "sliding_window_size": None}
MIXTRAL = {"name": "Mixtral-8x7B-v0.1", "n_expert": 4, "sliding_window_size": None}
UNTIED = {"tie_embeddings": False}


def write(folder: Path, settings: Tuner, model_changes: dict[str, Any], **run: Any) -> None:
    """A base and an adapter that is not at its first values."""
    model = build_adapted(settings, **model_changes).float()
    perturb(model)
    save_model_folder(folder / "base", config=model.config, tensors=copy_base(model), dtype=torch.float32)
    save_adapter(folder, model, settings, **run)


def export(folder: Path, *flags: str) -> int:
    return main(["convert_from_litgpt", str(folder / "adapter"), str(folder / "out"), "--format", "vllm", *flags])


def apply_by_rules_of_vllm(folder: Path, base: dict[str, Tensor]) -> None:
    """Add every pair in a file to the matrix of its name, by the one rank and scale of the config."""
    config = json.loads((folder / "adapter_config.json").read_text())
    pairs = load_file(folder / "adapter_model.safetensors")
    scale, applied = config["lora_alpha"] / config["r"], 0
    for name, a in pairs.items():
        layer, _, half = name.removeprefix("base_model.model.").partition(".lora_")
        if half not in ("A.weight", "embedding_A"):
            continue
        assert a.shape[0] == config["r"]
        b = pairs[name.replace("A.weight", "B.weight").replace("embedding_A", "embedding_B")]
        base[f"{layer}.weight"] += scale * (a.mT @ b.mT if half == "embedding_A" else b @ a)
        applied += 2
    assert applied == len(pairs) and not config["rank_pattern"] and not config["use_rslora"]


APPLIED: dict[str, tuple[LoRA, dict[str, Any]]] = {
    "default": (LoRA(r=3), {}),
    "pissa, rslora": (LoRA(r=4, init="pissa", rslora=True), {}),
    "fused in part": (LoRA(r=4, target_modules=["q", "v", "up", "down"]), PHI3),
    "embedding": (LoRA(r=4, target_modules=["embedding", "head", "q"]), UNTIED),
    "experts": (LoRA(r=4), MIXTRAL),
}


@pytest.mark.parametrize("case", APPLIED)
def test_what_vllm_computes_is_the_merged_model(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings, changes = APPLIED[case]
    write(tmp_path, settings, changes)
    assert main(["merge_lora", str(tmp_path / "adapter"), "--output_dir", str(tmp_path / "merged")]) == 0
    assert export(tmp_path) == 0
    assert "--enable-lora --max-lora-rank 8 --lora-modules out=" in capsys.readouterr().out
    base = load_file(tmp_path / "base" / "model.safetensors")
    apply_by_rules_of_vllm(tmp_path / "out", base)
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert merged.keys() == base.keys()
    assert all((merged[name] - base[name]).abs().max() < 1e-5 for name in merged)
    cpu = torch.device("cpu")
    logits = [open_model(tmp_path / name, device=cpu, dtype=torch.float32)(IDS) for name in ("out", "adapter")]
    assert (logits[0] - logits[1]).abs().max() < 1e-4


REFUSED: dict[str, tuple[Tuner, dict[str, Any], dict[str, Any], str]] = {
    "tuner": (VeRA(r=8), {}, {}, "tuner: VeRA is not a tuner that vLLM applies"),
    "dora": (LoRA(dora=True), {}, {}, "tuner.dora: true is not applied"),
    "bias": (LoRA(bias="all"), {}, {}, "tuner.bias: all is not applied by vLLM (blocks.0.attention.k.bias is trained)"),
    "saved": (LoRA(modules_to_save=["norm"]), {}, {}, "tuner.modules_to_save: norm is not applied"),
    "untied": (LoRA(modules_to_save=["head"]), UNTIED, {}, "tuner.modules_to_save: head is not applied"),
    "tied": (LoRA(target_modules=["embedding"]), {"tie_embeddings": True}, {}, "embedding is both embedding and head"),
    "named otherwise": (LoRA(target_modules=["head"]), {"name": "pythia-14m"}, {}, "published as embed_out"),
    "stacks": (
        LoRA(),
        {"name": "gpt-oss-20b", "n_expert": 4},
        {},
        "blocks.0.mlp.experts.gate is published as one tensor of all experts, model.layers.0.mlp.experts.gate_up_proj",
    ),
    "router": (LoRA(target_modules=["all-router"]), MIXTRAL, {}, "blocks.0.mlp.router is a router"),
    "config": (LoRA(), {}, {"model_config": {"rope_base": 500}}, "model_config.rope_base: 500 was set in training"),
    "loftq": (LoRA(init="loftq"), {}, {"quantize": "bnb.nf4"}, "tuner.init: loftq corrects the error of the base"),
    "rank": (LoRA(r=513), {"n_layer": 1}, {}, "tuner.r: 513 is more than vLLM's largest rank, 512"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_vllm_would_ignore_is_refused(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings, changes, run, message = REFUSED[case]
    write(tmp_path, settings, changes, **run)
    capsys.readouterr()
    assert export(tmp_path) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert f"merge the adapter and serve the model: litgpt merge_lora {tmp_path / 'adapter'}" in error
    assert not (tmp_path / "out").exists()


def test_a_whole_model_needs_no_export_for_vllm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, LoRA(r=2), {})
    assert main(["convert_from_litgpt", str(tmp_path / "base"), str(tmp_path / "out"), "--format", "vllm"]) == 1
    assert "holds a whole model, which vLLM serves as it is; give an adapter" in capsys.readouterr().err
