"""What an error tells the user to set is accepted by the same command, and cures it."""

import json
import re
import shutil
from pathlib import Path

import pytest

from litgpt import cli
from litgpt.data.tokenizer import train_tokenizer
from litgpt.store.adapters.folder import ADAPTER_CONFIG


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    train_tokenizer([], "bytes", 258, tmp_path / "tok")
    (tmp_path / "text").mkdir()
    for name in ("a", "b"):
        (tmp_path / "text" / f"{name}.txt").write_text("some words " * 20)
    (tmp_path / "bad").mkdir()
    for name in ("a", "b"):
        (tmp_path / "bad" / f"{name}.jsonl").write_text('{"text": "a"}\n{"text": 3}\n')
    row = {"query": "a question", "response": "an answer"}
    (tmp_path / "rows.jsonl").write_text("\n".join([json.dumps(row)] * 4))
    return tmp_path


def fail(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """Run a command that fails; returns its error."""
    capsys.readouterr()
    assert cli.main(list(words)) in (1, 2)
    return capsys.readouterr().err.strip().splitlines()[-1].removeprefix("litgpt: error: ")


TEXTS = ("TextFiles", "--data.train_data_path", "text", "--data.cache_dir", "cache")
CHATS = ("Conversations", "--data.sources", "[rows.jsonl]", "--data.prompt_style", "alpaca", "--data.num_workers", "0")


@pytest.mark.parametrize("command", ["inspect", "prepare"])
@pytest.mark.parametrize(
    ("data", "length", "message", "cure"),
    [
        (TEXTS, 1000, r"set train\.max_seq_length to (\d+) or less$", None),
        ((*CHATS, "--data.on_overlong", "raise"), 8, r"have more than train\.max_seq_length: 8; increase it", 400),
        (CHATS, 8, r"has an answer within train\.max_seq_length: 8 tokens; the longest has (\d+): increase", None),
        (
            (*CHATS, "--data.packing.enabled", "true", "--data.packing.length", "300"),
            200,
            r"data\.packing\.length: 300 is longer than train\.max_seq_length: 200; use at most 200$",
            300,
        ),
    ],
)
def test_lengths_of_data(capsys, command, data, length, message, cure):
    words = ["data", command, *data, "--tokenizer_dir", "tok"]
    found = re.search(message, error := fail(capsys, *words, "--max_seq_length", str(length)))
    assert found and "train.max_seq_length" in error, error
    assert cli.main([*words, "--train.max_seq_length", str(cure or found[1])]) == 0


def test_length_of_streamed_data(capsys):
    settings = ("--data.streaming", "true", "--data.val_fraction", "0", "--data.on_overlong", "raise")
    words = ["data", "inspect", *CHATS, *settings, "--tokenizer_dir", "tok"]
    assert "tokens are more than train.max_seq_length: 8; increase it" in fail(capsys, *words, "--max_seq_length", "8")
    assert cli.main([*words, "--train.max_seq_length", "400"]) == 0


def test_both_names_of_a_key(folder, litgpt):
    (folder / "one.yaml").write_text("data: TextFiles\ntrain: {max_seq_length: 64}\n")
    (folder / "both.yaml").write_text("data: TextFiles\nmax_seq_length: 32\ntrain: {max_seq_length: 64}\n")
    (folder / "more.yaml").write_text("data: TextFiles\ntrain: {max_seq_length: 64, max_steps: 3}\n")
    words = ("data", "inspect", "--data.train_data_path", "text")
    assert litgpt(*words, "--config", "one.yaml").recipe.max_seq_length == 64
    assert litgpt(*words, "--config", "one.yaml", "--max_seq_length", "16").recipe.max_seq_length == 16
    error = litgpt(*words, "--config", "both.yaml").error_line()
    assert error == "train.max_seq_length and max_seq_length are the same setting; set one of them"
    assert "train is not a key" in litgpt(*words, "--config", "more.yaml").error_line()
    assert "did you mean train.max_seq_length?" in litgpt("finetune", "x", "--max_seq_length", "8").error_line()


def test_tokenizer_train(capsys):
    words = ["tokenizer", "train", "bad", "new"]
    assert fail(capsys, *words, "--vocab_size", "100").startswith(
        "vocab_size: 100 is not valid; use an integer from 258"
    )
    assert "vocab_size: 300 has no effect with kind: bytes" in fail(
        capsys, *words, "--vocab_size", "300", "--kind", "bytes"
    )
    assert fail(capsys, *words, "--vocab_size", "300").endswith("fix it, or set bad_rows: skip")
    assert cli.main([*words, "--vocab_size", "300", "--bad_rows", "skip"]) == 0


def test_bad_rows_of_text(capsys):
    words = ["data", "prepare", "TextFiles", "--data.train_data_path", "bad", "--tokenizer_dir", "tok"]
    words += ["--train.max_seq_length", "1"]
    assert fail(capsys, *words).endswith("fix it, or set data.bad_rows: skip")
    assert cli.main([*words, "--data.bad_rows", "skip"]) == 0


def test_prompt_style(capsys):
    words = ["data", "prepare", *CHATS, "--tokenizer_dir", "tok"]
    error = fail(capsys, *words, "--data.prompt_style", "alpacca")
    assert error == "data.prompt_style: 'alpacca' is not known; did you mean alpaca?"


def test_settings_of_an_adapter_are_named_with_their_file(folder, capsys):
    shutil.copytree(folder / "tok", folder / "model")
    shape = {
        "n_layer": 1,
        "n_head": 2,
        "n_embd": 8,
        "padded_vocab_size": 64,
        "block_size": 16,
        "name": "toy",
        "rotary_percentage": 1,
    }
    (folder / "model" / "model_config.yaml").write_text(json.dumps(shape))
    (folder / "adapter").mkdir()
    choice = {"class_path": "LoRA", "init_args": {"r": 0}}
    (folder / "adapter" / ADAPTER_CONFIG).write_text(
        json.dumps({"litgpt": choice, "base_model_name_or_path": str(folder / "model")})
    )
    for command in ("generate", "merge_lora"):
        assert fail(capsys, command, "adapter").startswith(f"adapter/{ADAPTER_CONFIG}: r: 0 is not valid; use a number")
    error = fail(capsys, "finetune_full", "adapter", "--data", "Alpaca")
    assert error.endswith("train it further with litgpt finetune BASE --initial_adapter_dir ADAPTER")
