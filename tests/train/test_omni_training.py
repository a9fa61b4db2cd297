"""Finetuning of a model that sees and hears: what is trained and what stays, and packing."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from litgpt.cli import main
from litgpt.data.modules.finetuning import Packing
from tests.omni_model import write_omni_model, write_omni_rows, write_whole_model
from tests.train.test_vision_training import compute, finetune


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the model `model` and the rows `rows.jsonl`."""
    folder = tmp_path_factory.mktemp("base")
    write_omni_model(folder / "model")
    write_omni_rows(folder)
    return folder


def find_changed(base: Path, out: Path) -> set[str]:
    """The parts of the model whose tensors differ from those before."""
    before, after = (load_file(folder / "model.safetensors") for folder in (base / "model", out / "final"))
    assert before.keys() == after.keys()
    names = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert "audio_tower.audio_bos_eos_token.weight" not in names
    projectors = ("visual.merger", "audio_tower.proj")
    parts = {"visual": "vision", "audio_tower": "audio", "model": "llm", "lm_head": "llm"}
    return {"aligner" if name.startswith(projectors) else parts[name.partition(".")[0]] for name in names}


CASES = [
    (
        "finetune_full",
        "--freeze.vision false --freeze.audio false --freeze.aligner false",
        {"llm", "vision", "audio", "aligner"},
    ),
    pytest.param("finetune", "--freeze.vision false", {"llm", "vision"}, marks=pytest.mark.slow),
    pytest.param("finetune", "--freeze.llm true --freeze.audio false", {"audio"}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("command", "flags", "trained"), CASES)
def test_frozen_parts_stay_to_the_bit(command: str, flags: str, trained: set[str], base: Path, tmp_path: Path) -> None:
    finetune(base, tmp_path / "out", *flags.split(), command=command)
    assert find_changed(base, tmp_path / "out") == trained
    final = tmp_path / "out" / "final"
    for name in ("preprocessor_config.json", "video_preprocessor_config.json"):
        assert (final / name).read_bytes() == (base / "model" / name).read_bytes()
    before, after = (json.loads((path / "config.json").read_text()) for path in (base / "model", final))
    assert after["audio_config"] == before["audio_config"] and after["vision_config"] == before["vision_config"]


def test_packed_rows_equal_padded_ones(base: Path) -> None:
    loss, gradients = compute("model", base)
    for start in ("audio.blocks", "vision.blocks", "audio.projector", "vision.projector"):
        assert any(name.startswith(start) for name in gradients)
    for settings in ({"padding": True}, {"packing": Packing(True)}):
        other_loss, others = compute("model", base, **settings)
        assert other_loss == pytest.approx(loss, abs=1e-9)
        for name, gradient in gradients.items():
            torch.testing.assert_close(others[name], gradient, atol=1e-9, rtol=1e-7)


def test_further_parts_of_a_model_go_along(base: Path, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    whole.mkdir()
    write_whole_model(whole / "model", base / "model")
    write_omni_rows(whole)
    finetune(whole, tmp_path / "out", command="finetune")
    merged = tmp_path / "merged"
    assert main(["merge_lora", str(tmp_path / "out" / "adapter"), "--output_dir", str(merged)]) == 0
    before = load_file(whole / "model" / "model.safetensors")
    for folder in (tmp_path / "out" / "final", merged):
        after = load_file(folder / "model.safetensors")
        changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
        assert after.keys() == before.keys() and changed
        assert all(name.startswith("thinker.model.layers.") for name in changed)
        values = json.loads((folder / "config.json").read_text())
        assert values["model_type"] == "qwen2_5_omni" and values["talker_config"] == {"vocab_size": 2}
        assert (folder / "spk_dict.pt").read_bytes() == b"voices"
    assert main(["convert_to_litgpt", str(merged), "--dtype", "bfloat16"]) == 0
    types = {name: tensor.dtype for name, tensor in load_file(merged / "model.safetensors").items()}
    assert types["thinker.lm_head.weight"] == torch.bfloat16 and types["token2wav.filter"] == torch.float32
    assert (merged / "spk_dict.pt").read_bytes() == b"voices"
