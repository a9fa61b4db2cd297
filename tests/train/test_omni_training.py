"""Finetuning of a model that sees and hears: what is trained and what stays, and packing."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from litgpt.data.modules.finetuning import Packing
from tests.omni_model import write_omni_model, write_omni_rows
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
