"""Finetuning of models that hear: what is trained and what stays, packing, and refusals."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from litgpt.cli import main
from litgpt.data.modules.finetuning import Packing
from tests.audio_model import write_audio_model, write_sound_rows
from tests.train.test_vision_training import compute, finetune


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the model `model` and the rows `rows.jsonl`."""
    folder = tmp_path_factory.mktemp("base")
    write_audio_model(folder / "model")
    write_sound_rows(folder)
    return folder


def find_changed(base: Path, out: Path) -> set[str]:
    """The parts of the model whose tensors differ from those before, and the positions of the tower if they do."""
    before, after = (load_file(folder / "model.safetensors") for folder in (base / "model", out / "final"))
    assert before.keys() == after.keys()
    names = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert "audio_tower.embed_positions.weight" not in names
    starts = {"audio_tower": "audio", "multi_modal_projector": "aligner", "language_model": "llm"}
    return {starts[name.partition(".")[0]] for name in names}


CASES = [
    ("finetune_full", "--freeze.audio false --freeze.aligner false", {"llm", "audio", "aligner"}),
    pytest.param("finetune_full", "", {"llm"}, marks=pytest.mark.slow),
    ("finetune", "--freeze.llm true --freeze.audio false", {"audio"}),
    pytest.param("finetune", "--tuner LoRA --freeze.aligner false", {"llm", "aligner"}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("command", "flags", "trained"), CASES)
def test_frozen_parts_stay_to_the_bit(command: str, flags: str, trained: set[str], base: Path, tmp_path: Path) -> None:
    finetune(base, tmp_path / "out", *flags.split(), command=command)
    assert find_changed(base, tmp_path / "out") == trained
    name = "preprocessor_config.json"
    assert (tmp_path / "out" / "final" / name).read_bytes() == (base / "model" / name).read_bytes()


def test_packed_rows_equal_padded_ones(base: Path) -> None:
    loss, gradients = compute("model", base)
    assert any(name.startswith("audio.blocks") for name in gradients)
    for settings in ({"padding": True}, {"packing": Packing(True)}):
        other_loss, others = compute("model", base, **settings)
        assert other_loss == pytest.approx(loss, abs=1e-9)
        for name, gradient in gradients.items():
            torch.testing.assert_close(others[name], gradient, atol=1e-9, rtol=1e-7)


@pytest.mark.parametrize(
    ("command", "flags", "message"),
    [
        ("finetune_full", "--freeze.vision false", "freeze.vision: false has no effect with a model without a vision"),
        ("finetune_full", "--freeze.llm true", "freeze: llm, audio, aligner are all true"),
        ("rm", "", "it has an audio tower, which only litgpt finetune, finetune_full, align, dpo and kto train"),
    ],
)
def test_refusals(
    command: str, flags: str, message: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = [
        "--data",
        "Conversations" if command != "rm" else "Preferences",
        "--data.sources",
        str(base / "rows.jsonl"),
    ]
    line = [command, str(base / "model"), *data, "--out_dir", str(tmp_path), "--train.max_steps", "1", *flags.split()]
    assert main(line) != 0
    assert message in capsys.readouterr().err
