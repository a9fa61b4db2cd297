"""Which files the weights in a folder are read from, and the line about those that are not read."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from litgpt.errors import UserError
from litgpt.store import weight_files
from litgpt.store.adapters.folder import read_peft_tensors
from litgpt.store.weight_files import list_safetensors, open_weights

INDEX, SHARDS = "model.safetensors.index.json", ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


def write_sets(folder: Path, names: list[str]) -> None:
    """Write files of weights; the values of each are the position of its name in the list."""
    folder.mkdir()
    for number, name in enumerate(names):
        tensors = {part: torch.full((2,), float(number)) for part in ("a", "b")}
        if name.endswith(".safetensors"):
            save_file(tensors, folder / name)
        elif name.endswith((".bin", ".pth")):
            torch.save(tensors, folder / name)
        elif name == INDEX:
            for shard, part in zip(SHARDS, tensors, strict=True):
                save_file({part: tensors[part]}, folder / shard)
            (folder / name).write_text(json.dumps({"weight_map": dict(zip(tensors, SHARDS, strict=True))}))
        elif name.endswith("index.json"):
            absent = "gone" + Path(name.removesuffix(".index.json")).suffix
            (folder / name).write_text(json.dumps({"weight_map": {"a": absent, "b": absent}}))
        else:
            (folder / name).write_bytes(b"")


@pytest.mark.parametrize(
    "names",
    [
        ["model.safetensors", INDEX],
        ["model.safetensors", "pytorch_model.bin"],
        ["model.safetensors", "lit_model.pth", "some.gguf", "other.gguf", "consolidated.safetensors"],
        ["model.safetensors", "loose.safetensors"],
        ["model.safetensors", "absent.safetensors.index.json"],
        ["model.safetensors", "pytorch_model.bin.index.json"],
        [INDEX, "pytorch_model.bin", "consolidated.safetensors"],
        ["loose.safetensors", "lit_model.pth", "consolidated-00001-of-00001.safetensors"],
        ["lit_model.pth", "pytorch_model.bin"],
        ["pytorch_model.bin", "pytorch_model.bin.index.json"],
    ],
    ids=" ".join,
)
def test_of_several_sets_of_weights_the_first_is_read_and_the_others_are_named_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], names: list[str]
) -> None:
    names = [name.replace("absent.", "model.") for name in names]
    write_sets(tmp_path / "m", names)
    for _ in range(2):
        source = open_weights(tmp_path / "m")
        assert {name: source.read(name).tolist() for name in source.names} == {"a": [0, 0], "b": [0, 0]}
    (line,) = capsys.readouterr().err.splitlines()
    read, _, unread = line.partition(" not ")
    assert (names[0] in read or SHARDS[0] in read) and all(name in unread for name in names[1:])
    is_safetensors = not names[0].endswith((".pth", ".bin"))
    assert [path.name for path in list_safetensors(tmp_path / "m")][:1] == names[:1] * is_safetensors


@pytest.mark.parametrize(
    "names", [["model.safetensors"], [INDEX], ["one.safetensors"], ["model.safetensors", "adapter_model.safetensors"]]
)
def test_one_set_of_weights_needs_no_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], names: list[str]) -> None:
    write_sets(tmp_path / "m", names)
    assert open_weights(tmp_path / "m").read("a").tolist() == [0, 0]
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (["adapter_model.safetensors"], "no weights in it"),
        (["one.gguf", "two.gguf"], "holds 2 .gguf files"),
        (["pytorch_model.bin.index.json"], "lists gone.bin"),
        (["one.safetensors", "two.safetensors"], "is in one.safetensors and in two.safetensors"),
    ],
    ids=str,
)
def test_weights_that_cannot_be_chosen_are_refused(tmp_path: Path, names: list[str], reason: str) -> None:
    write_sets(tmp_path / "m", names)
    with pytest.raises(UserError, match=reason):
        open_weights(tmp_path / "m")


def test_an_adapter_in_two_formats_is_read_from_safetensors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_sets(tmp_path / "m", ["adapter_model.safetensors", "adapter_model.bin"])
    path, tensors, _ = read_peft_tensors(tmp_path / "m")
    assert path.name == "adapter_model.safetensors" and tensors["a"].tolist() == [0, 0]
    assert "reads adapter_model.safetensors, not adapter_model.bin" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["model.safetensors", "loose.safetensors"])
def test_the_blocks_of_fp8_are_those_of_the_folder_itself(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders: list[Path] = []
    monkeypatch.setattr(weight_files.dequantize, "read_block_size", lambda folder: [folders.append(folder), (2, 2)][1])
    (tmp_path / "m").mkdir()
    tensors = {"x.weight": torch.ones(4, 4).to(torch.float8_e4m3fn), "x.weight_scale_inv": torch.full((2, 2), 3.0)}
    save_file(tensors, tmp_path / "m" / name)
    assert open_weights(tmp_path / "m").read("x.weight").tolist() == [[3.0] * 4] * 4
    assert folders == [tmp_path / "m"]
