"""Hostile model folders: a pickle that would run code runs nothing, an index cannot lead out, damage has a name."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from litgpt.errors import UserError
from litgpt.model.config import Config
from litgpt.model.gpt import GPT
from litgpt.store.legacy import load_torch_file
from litgpt.store.load_model import load_model
from litgpt.store.save_model import save_model_folder
from litgpt.store.weight_files import open_torch_files

CONFIG = Config(
    name="tiny",
    n_layer=1,
    n_embd=16,
    n_head=2,
    block_size=8,
    padded_vocab_size=32,
    intermediate_size=24,
    mlp_class_name="LLaMAMLP",
    norm_class_name="RMSNorm",
    bias=False,
    parallel_residual=False,
    rotary_percentage=1.0,
)


class Hostile:
    """Creates a file when it is unpickled."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.proof}",)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = GPT(CONFIG)
    save_model_folder(
        tmp_path / "model", config=CONFIG, tensors=dict(model.named_parameters()), shard_bytes=3000, tokenizer_dir=None
    )
    return tmp_path / "model"


def refusal(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        load_model(GPT(CONFIG), folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def drop_safetensors(folder: Path) -> None:
    for path in folder.glob("*.safetensors*"):
        path.unlink()


@pytest.mark.parametrize("name", ["lit_model.pth", "pytorch_model.bin"])
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("form", ["alone", "among", "model"])
def test_a_hostile_pickle_runs_nothing(folder: Path, tmp_path: Path, name: str, zipped: bool, form: str) -> None:
    drop_safetensors(folder)
    proof = tmp_path / "proof"
    trap = Hostile(proof)
    content = {"alone": trap, "among": {"a": torch.ones(2), "b": trap}, "model": {"model": {"a": trap}}}[form]
    torch.save(content, folder / name, _use_new_zipfile_serialization=zipped)
    assert name in refusal(folder)
    assert not proof.exists()
    torch.load(folder / name, weights_only=False)
    assert proof.exists(), "the trap does not work, so the test shows nothing"


def test_a_hostile_file_beside_safetensors_is_never_opened(folder: Path, tmp_path: Path) -> None:
    torch.save(Hostile(tmp_path / "proof"), folder / "lit_model.pth")
    load_model(GPT(CONFIG), folder)
    assert not (tmp_path / "proof").exists()


@pytest.mark.parametrize("content", [b"", b"\0" * 100, b"PK\x03\x04" + b"x" * 50, b"\x80\x02}q\x00."])
def test_a_file_that_is_no_torch_file_has_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "lit_model.pth").write_bytes(content)
    with pytest.raises(UserError, match=r"lit_model\.pth"):
        open_torch_files([tmp_path / "lit_model.pth"])


def test_a_missing_file_has_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.pth: no such file"):
        load_torch_file(tmp_path / "none.pth")
    with pytest.raises(UserError, match="no weights in it"):
        load_model(GPT(CONFIG), tmp_path)


@pytest.mark.parametrize(
    "name",
    ["../outside.safetensors", "/etc/passwd", "a/../../outside.safetensors", "", "x" * 4096, "C:\\x", "a\0b", "link"],
)
def test_an_index_cannot_lead_out_of_its_folder(folder: Path, tmp_path: Path, name: str) -> None:
    save_file({"secret": torch.ones(1)}, tmp_path / "outside.safetensors")
    (folder / "link").symlink_to(tmp_path / "outside.safetensors")
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.norm.weight"] = name
    index.write_text(json.dumps(content))
    assert "invalid file name" in refusal(folder) or "outside of" in refusal(folder)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', "\ufeff{}"])
def test_a_malformed_index_has_one_line(folder: Path, content: str) -> None:
    (folder / "model.safetensors.index.json").write_text(content)
    assert "model.safetensors.index.json" in refusal(folder)


def test_an_index_that_lies_is_refused(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    shards = sorted(set(content["weight_map"].values()))
    content["weight_map"]["model.norm.weight"] = next(
        shard for shard in shards if shard != content["weight_map"]["model.norm.weight"]
    )
    index.write_text(json.dumps(content))
    assert "model.norm.weight is not in" in refusal(folder)
    content["weight_map"] = {"lm_head.weight": "gone.safetensors"}
    index.write_text(json.dumps(content))
    assert "gone.safetensors" in refusal(folder)


@pytest.mark.parametrize("keep", [0.0, 0.01, 0.5, 0.999])
def test_a_cut_shard_is_named(folder: Path, keep: float) -> None:
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[: int(shard.stat().st_size * keep)])
    assert shard.name in refusal(folder)


def test_a_tensor_in_two_shards_is_refused(folder: Path) -> None:
    first, second = sorted(folder.glob("model-*.safetensors"))[:2]
    state = load_file(first)
    save_file(load_file(second) | {next(iter(state)): next(iter(state.values()))}, second)
    assert first.name in refusal(folder) and second.name in refusal(folder)


COMMANDS = (["convert_to_litgpt"], ["convert_to_litgpt", "--dtype", "bfloat16"], ["validate"], ["verify"])


def hostile_bin(folder: Path, proof: Path) -> None:
    drop_safetensors(folder)
    torch.save({"model.norm.weight": Hostile(proof)}, folder / "pytorch_model.bin")


def index_outside(folder: Path, _proof: Path) -> None:
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.norm.weight"] = "../outside.safetensors"
    save_file({"model.norm.weight": torch.ones(16)}, folder.parent / "outside.safetensors")
    index.write_text(json.dumps(content))


def cut_shard(folder: Path, _proof: Path) -> None:
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-7])


def wrong_type(folder: Path, _proof: Path) -> None:
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    save_file({name: tensor.to(torch.int32) for name, tensor in load_file(shard).items()}, shard)


def rewrite_header(folder: Path, change: object) -> None:
    """Change what the header of a shard says of its first tensor; the bytes after it stay."""
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    content = shard.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    entry = next(value for name, value in header.items() if name != "__metadata__")
    change(entry)  # type: ignore[operator]
    text = json.dumps(header).encode()
    shard.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


def forge_shape(folder: Path, _proof: Path) -> None:
    rewrite_header(folder, lambda entry: entry.update(shape=[10**6, 10**6]))


def forge_offsets(folder: Path, _proof: Path) -> None:
    rewrite_header(folder, lambda entry: entry.update(data_offsets=[0, 10**12]))


def forge_dtype(folder: Path, _proof: Path) -> None:
    rewrite_header(folder, lambda entry: entry.update(dtype="F64"))


def unknown_type(folder: Path, _proof: Path) -> None:
    rewrite_header(folder, lambda entry: entry.update(dtype="F3"))


def forge_length(folder: Path, _proof: Path) -> None:
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    shard.write_bytes((2**63 - 1).to_bytes(8, "little") + shard.read_bytes()[8:])


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
@pytest.mark.parametrize(
    "spoil",
    [
        hostile_bin,
        index_outside,
        cut_shard,
        wrong_type,
        forge_shape,
        forge_offsets,
        forge_dtype,
        unknown_type,
        forge_length,
    ],
)
def test_every_command_says_one_line_runs_nothing_and_writes_nothing(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: list[str], spoil: object
) -> None:
    from litgpt.cli import main

    spoil(folder, tmp_path / "proof")  # type: ignore[operator]
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert main([command[0], str(folder), *command[1:]]) == 1
    messages = capsys.readouterr().err.splitlines()
    errors = [line for line in messages if line.startswith("litgpt: error: ")]
    assert errors == messages[-1:] and "Traceback" not in messages[-1]
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert not (tmp_path / "proof").exists()
