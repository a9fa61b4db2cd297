"""Finetuning of models with a vision tower: what is trained and what stays, resuming, packing, and refusals."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from litgpt.cli import main
from litgpt.data import Conversations
from litgpt.data.modules.finetuning import Packing
from litgpt.data.tokenizer import Tokenizer
from litgpt.model.config import Config
from litgpt.model.flops import compute_training_flops
from litgpt.model.gpt import GPT
from litgpt.model.tower_flops import EncodedMedia
from litgpt.parallel.precision import PRECISIONS
from litgpt.recipe.data import BatchShape
from litgpt.recipe.train import LossArgs
from litgpt.store.load_model import load_model
from litgpt.train import loop
from litgpt.train.objective import next_token
from litgpt.train.step import add_gradients
from litgpt.train.train_state import TrainState
from tests.chat_model import write_chat_model
from tests.vision_model import write_color_rows, write_vision_model

FLAGS = [
    *("--data", "Conversations", "--data.num_workers", "0", "--data.val_fraction", "0.2", "--precision", "32-true"),
    *("--train.max_steps", "4", "--train.global_batch_size", "4", "--train.micro_batch_size", "2"),
    *("--train.lr_warmup_steps", "0", "--optimizer.lr", "1e-2", "--train.save_interval", "null"),
    *("--eval.max_new_tokens", "null", "--train.max_seq_length", "200"),
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the model `model` and the rows `rows.jsonl`."""
    folder = tmp_path_factory.mktemp("base")
    write_vision_model(folder / "model", "smolvlm")
    write_color_rows(folder)
    return folder


def finetune(base: Path, out: Path, *flags: str, command: str = "finetune_full", code: int = 0) -> None:
    data = ["--data.sources", str(base / "rows.jsonl"), "--data.cache_dir", str(base / "cache")]
    assert main([command, str(base / "model"), *FLAGS, *data, "--out_dir", str(out), *flags]) == code


def find_changed(base: Path, out: Path) -> set[str]:
    """The parts of the model whose tensors differ from those before; of a part that is trained, all do."""
    before, after = (load_file(folder / "model.safetensors") for folder in (base / "model", out / "final"))
    assert before.keys() == after.keys()
    changed: dict[str, set[bool]] = {}
    for name, tensor in before.items():
        part = "aligner" if "connector" in name else "vision" if "vision_model" in name else "llm"
        changed.setdefault(part, set()).add(not torch.equal(tensor, after[name]))
    return {part for part, values in changed.items() if True in values}


@pytest.mark.parametrize(
    ("command", "flags", "trained"),
    [
        ("finetune_full", "", {"llm"}),
        ("finetune_full", "--freeze.llm true --freeze.aligner false", {"aligner"}),
        ("finetune_full", "--freeze.vision false --freeze.aligner false", {"llm", "vision", "aligner"}),
        (
            "finetune_full",
            "--freeze.vision false --freeze.aligner false --rates.vision 0 --rates.aligner 1e-3",
            {"llm", "aligner"},
        ),
        ("finetune", "--lora_mlp true", {"llm"}),
        ("finetune", "--freeze.llm true --freeze.vision false", {"vision"}),
        ("finetune", "--tuner LoRA --freeze.llm true --freeze.aligner false", {"aligner"}),
        ("finetune", "--tuner VeRA --tuner.r 4 --freeze.vision false", {"llm", "vision"}),
    ],
)
def test_frozen_parts_stay_to_the_bit(command: str, flags: str, trained: set[str], base: Path, tmp_path: Path) -> None:
    finetune(base, tmp_path / "out", *flags.split(), command=command)
    assert find_changed(base, tmp_path / "out") == trained
    for name in ("preprocessor_config.json", "chat_template.jinja", "config.json"):
        assert (tmp_path / "out" / "final" / name).exists()
    processor = "preprocessor_config.json"
    assert (tmp_path / "out" / "final" / processor).read_bytes() == (base / "model" / processor).read_bytes()


def test_resumed_run_equals_one_without_pause(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = []

    def count_flops(*args: Any, media: EncodedMedia, **settings: Any) -> float:
        counted.append(media.patches)
        return compute_training_flops(*args, media=media, **settings)

    monkeypatch.setattr(loop, "compute_training_flops", count_flops)
    flags = ["--train.max_steps", "20", "--train.save_interval", "10", "--freeze.vision", "false"]
    finetune(base, tmp_path / "whole", *flags)
    assert len(counted) == 20 and all(patches % 16 == 0 for patches in counted) and max(counted) > 0
    shutil.copytree(tmp_path / "whole" / "step-00000010", tmp_path / "half" / "step-00000010")
    finetune(base, tmp_path / "half", *flags, "--resume", "true", "--data.num_workers", "1")
    whole, half = (load_file(tmp_path / name / "final" / "model.safetensors") for name in ("whole", "half"))
    assert all(torch.equal(tensor, half[name]) for name, tensor in whole.items())


def compute(kind: str, folder: Path, **settings: Any) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss and the gradients of one step over all rows, in float64."""
    data = Conversations(
        str(folder / "rows.jsonl"), val_fraction=0.0, num_workers=0, cache_dir=folder / "cache", **settings
    )
    data.connect(Tokenizer(folder / kind), 2, 256)
    data.prepare_data()
    micro = 1 if "packing" in settings else 2
    shape = BatchShape(micro_batch_size=micro, global_batch_size=10, max_seq_length=256, rank=0, ranks=1, seed=0)
    rows = data.train_stream(shape)
    stream = iter(rows)
    batches = [next(stream) for _ in range(rows.samples_per_epoch // micro)]
    model = GPT(Config.from_checkpoint(folder / kind)).double()
    load_model(model, folder / kind)
    state = TrainState(model, [], torch.device("cpu"), PRECISIONS["64-true"])
    loss = add_gradients(state, batches, next_token(LossArgs(chunk_rows=16))).loss.item()
    return loss, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    "kind",
    ["smolvlm", "llava", "qwen2_vl"]
    + [pytest.param(kind, marks=pytest.mark.slow) for kind in ("llava_onevision", "llama4")],
)
def test_packed_rows_equal_padded_ones(kind: str, tmp_path: Path) -> None:
    write_vision_model(tmp_path / kind, kind)
    write_color_rows(tmp_path)
    loss, gradients = compute(kind, tmp_path)
    assert any(name.startswith("vision.blocks") for name in gradients)
    for settings in ({"padding": True}, {"packing": Packing(True)}):
        other_loss, others = compute(kind, tmp_path, **settings)
        assert other_loss == pytest.approx(loss, abs=1e-9)
        for name, gradient in gradients.items():
            torch.testing.assert_close(others[name], gradient, atol=1e-9, rtol=1e-7)


@pytest.mark.parametrize(
    ("command", "flags", "message"),
    [
        ("finetune_full", "--freeze.llm true", "freeze: llm, vision, aligner are all true"),
        (
            "finetune_full",
            "--freeze.vision false --rates.vision 0 --tuner.freeze_parameters_regex ^vision",
            "rates.vision: 0.0 has no effect with a tuner that trains nothing of vision; set rates.vision: null",
        ),
        ("finetune_full", "--tuner LISA", "tuner: LISA is not supported for a model with a tower; use LoRA"),
        ("finetune_full", "--data.streaming true --data.val_fraction null", "with data.streaming: true"),
        ("rm", "--data Preferences", "only litgpt finetune, finetune_full, align, dpo and kto train"),
    ],
)
def test_refusals(
    command: str, flags: str, message: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["--data.num_workers", "0"] if command != "rm" else []
    argv = [command, str(base / "model"), *(FLAGS if command != "rm" else []), *common, *flags.split()]
    argv += ["--data.sources", str(base / "rows.jsonl"), "--out_dir", str(tmp_path / "out")]
    assert main([*argv, "--data.cache_dir", str(base / "cache")]) == 1
    assert message in " ".join(capsys.readouterr().err.split())


def test_freezing_parts_has_no_effect_on_other_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_chat_model(tmp_path / "model")
    write_color_rows(tmp_path)
    finetune(tmp_path, tmp_path / "out", "--freeze.vision", "false", code=1)
    assert "freeze.vision: false has no effect with a model without a vision tower" in capsys.readouterr().err
