"""`validate` and the commands that load a model agree on every folder, damaged or odd."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from safetensors.torch import load_file, save_file

from litgpt.api import LLM
from litgpt.cli import main
from litgpt.data.tokenizer import train_tokenizer
from litgpt.store.save_model import save_model_folder
from tests.store.models import random_model, small, weights

WEIGHTS, HEAD, EMBEDDING = "model.safetensors", "lm_head.weight", "model.embed_tokens.weight"
SHAPE = small("Llama-2-7b-hf", padded_vocab_size=300)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    train_tokenizer(iter(["Hello llama, hello alpaca"] * 30), "bpe", 290, folder / "tokenizer")
    save_model_folder(
        folder / "m", config=SHAPE, tensors=weights(random_model(SHAPE)), tokenizer_dir=folder / "tokenizer"
    )
    (folder / "m" / "model_config.yaml").unlink()
    return folder / "m"


def edit_weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        state = load_file(folder / WEIGHTS)
        change(state)
        save_file(state, folder / WEIGHTS)

    return edit


def edit_config(**values: Any) -> Callable[[Path], object]:
    def edit(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return edit


def write(name: str, content: str | bytes) -> Callable[[Path], object]:
    data = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / name).write_bytes(data)


def tie(folder: Path) -> None:
    edit_config(tie_word_embeddings=True)(folder)


def tie_equal(folder: Path) -> None:
    tie(folder)
    edit_weights(lambda state: state.update({HEAD: state[EMBEDDING].clone()}))(folder)


def tie_short_head(folder: Path) -> None:
    tie(folder)
    edit_weights(lambda state: state.update({HEAD: state[HEAD][:-1].clone()}))(folder)


def as_bin(folder: Path) -> None:
    tie(folder)
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()


def as_loose(folder: Path) -> None:
    state = load_file(folder / WEIGHTS)
    for number, names in enumerate((sorted(state)[:5], sorted(state)[5:])):
        save_file({name: state[name] for name in names}, folder / f"part-{number}.safetensors")
    (folder / WEIGHTS).unlink()


def as_run(folder: Path) -> None:
    paths = list(folder.iterdir())
    (folder / "final").mkdir()
    for path in paths:
        path.rename(folder / "final" / path.name)


def add_tokens(folder: Path) -> None:
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_tokens([f"<{number}>" for number in range(60)])
    tokenizer.save(str(folder / "tokenizer.json"))


ABSENT = json.dumps({"weight_map": {HEAD: "model-00001-of-00001.safetensors"}})
NORM = "model.norm.weight"
FOLDERS: dict[str, tuple[Callable[[Path], object], bool]] = {
    "untouched": (lambda _: None, True),
    "tied, another head": (tie, True),
    "tied, the same head": (tie_equal, True),
    "tied, a head of another shape": (tie_short_head, False),
    "tied, another head in .bin": (as_bin, True),
    "loose files": (as_loose, True),
    "run": (as_run, True),
    "index of absent shards": (write(f"{WEIGHTS}.index.json", ABSENT), True),
    "only an index of absent shards": (
        lambda folder: (folder / WEIGHTS).rename(folder / f"{WEIGHTS}.index.json").write_text(ABSENT),
        False,
    ),
    "cut file": (lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-9]), False),
    "empty file": (write(WEIGHTS, b""), False),
    "tensor missing": (edit_weights(lambda state: state.pop(NORM)), False),
    "embedding missing, tied": (
        lambda folder: (tie(folder), edit_weights(lambda state: state.pop(EMBEDDING))(folder)),
        False,
    ),
    "tensor more": (edit_weights(lambda state: state.update(extra=torch.ones(1))), False),
    "tensor of another shape": (edit_weights(lambda state: state.update({NORM: torch.ones(3)})), False),
    "tensor of integers": (edit_weights(lambda state: state.update({NORM: torch.ones(32).int()})), False),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), False),
    "only an adapter's file": (lambda folder: (folder / WEIGHTS).rename(folder / "adapter_model.safetensors"), False),
    "hidden size of another model": (edit_config(hidden_size=64), False),
    "another model_type": (edit_config(model_type="unknown_model"), False),
    "config.json damaged": (write("config.json", "{"), False),
    "no config": (lambda folder: (folder / "config.json").unlink(), False),
    "model_config.yaml damaged": (write("model_config.yaml", "n_layer: many"), False),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), False),
    "tokens beyond the embedding": (add_tokens, True),
    "tokenizer damaged": (write("tokenizer.json", "{}"), False),
    "tokenizer_config.json damaged": (write("tokenizer_config.json", "["), False),
    "generation_config.json damaged": (write("generation_config.json", "["), False),
    "generation_config.json of another kind": (write("generation_config.json", "[]"), False),
    "file for a folder": (lambda folder: (shutil.rmtree(folder), folder.write_text("x")), False),
    "no folder": (shutil.rmtree, False),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_validate_fails_where_loading_fails(
    whole: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, (edit, loads) = tmp_path / "m", FOLDERS[name]
    shutil.copytree(whole, folder)
    edit(folder)
    code = main(["validate", str(folder)])
    validated = capsys.readouterr()
    line = ["generate", str(folder), "--prompt", "Hello", "--max_new_tokens", "1"]
    assert main(line) == code, (validated.out, capsys.readouterr().err)
    assert (code == 0) is loads, validated.out
    error = capsys.readouterr().err if code else ""
    assert "Traceback" not in error + validated.err


def test_a_head_that_differs_is_loaded_and_saved_apart(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM

    shutil.copytree(whole, tmp_path / "m")
    tie(tmp_path / "m")
    ids = torch.arange(9)[None]
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(tmp_path / "m")(ids).logits
        llm = LLM.load(tmp_path / "m")
        assert torch.allclose(llm.model(ids), expected, atol=1e-5)
        (line,) = (line for line in capsys.readouterr().err.splitlines() if "untied" in line)
        assert "lm_head.weight differs" in line
        llm.save(tmp_path / "saved")
        assert main(["convert_from_litgpt", str(tmp_path / "m"), str(tmp_path / "exported")]) == 0
        assert main(["convert_to_litgpt", str(tmp_path / "m")]) == 0
        assert AutoModelForCausalLM.from_pretrained(tmp_path / "m").config.tie_word_embeddings is False
        for name in ("saved", "exported", "m"):
            assert json.loads((tmp_path / name / "config.json").read_text())["tie_word_embeddings"] is False
            assert torch.allclose(LLM.load(tmp_path / name).model(ids), expected, atol=1e-5)
