"""litgpt validate and its Python functions: each fault is reported at its step, before weights are loaded."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import litgpt
from litgpt.cli import main
from litgpt.data.tokenizer import train_tokenizer
from litgpt.model.config import Config
from litgpt.model.gpt import GPT
from litgpt.store.save_model import save_model_folder
from tests.store.models import lit_state, random_model, small, weights

SHAPE = small("Llama-2-7b-hf", padded_vocab_size=300)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    train_tokenizer(iter(["Hello llama, hello alpaca"] * 30), "bpe", 290, tmp_path / "tokenizer")
    model = random_model(SHAPE)
    save_model_folder(tmp_path / "m", config=SHAPE, tensors=weights(model), tokenizer_dir=tmp_path / "tokenizer")
    return tmp_path / "m"


def change(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    state = load_file(folder / "model.safetensors")
    edit(state)
    save_file(state, folder / "model.safetensors")


def test_a_good_folder_passes_all_five_steps(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", str(folder), "--dtype", "bfloat16", "--training", "true"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert [line[:5] for line in said[:5]] == [f"[{number}/5]" for number in range(1, 6)]
    assert "FAILED" not in "".join(said) and "with gradients and moments" in said[4]


@pytest.mark.parametrize(
    ("step", "edit"),
    [
        ("files", lambda folder: (folder / "tokenizer.json").unlink()),
        ("shape", lambda folder: (folder / "model_config.yaml").write_text("n_layer: many\n")),
        ("tokenizer", lambda folder: (folder / "tokenizer.json").write_text("{}")),
        ("tensors", lambda folder: change(folder, lambda state: state.pop("model.norm.weight"))),
        ("tensors", lambda folder: change(folder, lambda state: state.update(extra=torch.ones(1)))),
        ("tensors", lambda folder: change(folder, lambda state: state.update({"model.norm.weight": torch.ones(5)}))),
        ("files", lambda folder: (folder / "model.safetensors").write_bytes(b"no")),
    ],
)
def test_a_fault_is_found_at_its_step(
    folder: Path, step: str, edit: Callable[[Path], object], capsys: pytest.CaptureFixture[str]
) -> None:
    edit(folder)
    assert main(["validate", str(folder)]) == 1
    output = capsys.readouterr()
    assert any(f"] {step}: FAILED: " in line for line in output.out.splitlines()), output.out
    assert output.err.count("\n") == 1 and step in output.err


def test_tokens_without_a_row_are_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train_tokenizer(iter(["Hello llama, hello alpaca"] * 30), "bpe", 290, tmp_path / "tokenizer")
    short = small("Llama-2-7b-hf", padded_vocab_size=270)
    save_model_folder(
        tmp_path / "m", config=short, tensors=weights(random_model(short)), tokenizer_dir=tmp_path / "tokenizer"
    )
    for line in (["validate"], ["generate", "--prompt", "o", "--max_new_tokens", "1"]):
        assert main([line[0], str(tmp_path / "m"), *line[1:]]) == 0
        (warning,) = (line for line in capsys.readouterr().err.splitlines() if "rows" in line)
        assert "tokens, but the model has 270 rows; a text with a token beyond them is refused" in warning


def test_the_file_that_is_named_is_the_one_that_is_checked(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = lit_state(random_model(SHAPE))
    torch.save(state, folder / "lit_model.pth")
    assert main(["validate", str(folder), "--model_filename", "lit_model.pth"]) == 0
    del state["transformer.ln_f.weight"]
    torch.save({"model": state}, folder / "lit_model.pth")
    assert main(["validate", str(folder), "--model_filename", "lit_model.pth"]) == 1
    assert "norm.weight is missing" in capsys.readouterr().out
    assert main(["validate", str(folder), "--model_filename", "gone.pth"]) == 1


def test_the_python_functions_say_what_is_wrong(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with torch.device("meta"):
        model = GPT(SHAPE)
    result = litgpt.validate_checkpoint(folder, model)
    assert isinstance(result, litgpt.CheckpointValidationResult)
    assert result.is_valid and capsys.readouterr().out == "Checkpoint validation passed.\n"

    def spoil(state: dict[str, torch.Tensor]) -> None:
        del state["model.norm.weight"]
        state |= {"extra": torch.ones(1), "model.embed_tokens.weight": torch.ones(3, 32)}

    change(folder, spoil)
    result = litgpt.validate_checkpoint(folder, model, verbose=False)
    assert not result.is_valid
    assert (result.missing_keys, result.unexpected_keys) == (["norm.weight"], ["extra"])
    assert "model.embed_tokens.weight is [3, 32]" in result.shape_mismatches[0] and not capsys.readouterr().out
    assert all(word in result.summary() for word in ("norm.weight", "extra", "of another shape"))
    assert litgpt.validate_checkpoint(folder / "gone", model, verbose=False).errors


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), (torch.bfloat16, 2)])
def test_memory_is_that_of_every_parameter(dtype: str | torch.dtype, size: int) -> None:
    config = small("Mixtral-8x7B-v0.1", n_expert=4, n_expert_per_token=2)
    estimate = litgpt.estimate_model_memory(config, dtype)
    assert estimate["param_count"] == sum(parameter.numel() for parameter in GPT(config).parameters())
    assert estimate["param_memory_gb"] == estimate["estimated_total_gb"] == estimate["param_count"] * size / 2**30
    training = litgpt.estimate_model_memory(config, dtype, training=True)
    assert training["estimated_total_gb"] == 4 * estimate["param_memory_gb"]
    assert litgpt.estimate_model_memory(Config.from_name("Llama-3.2-1B"))["param_count"] == 1_235_814_400
    assert json.dumps(estimate)
