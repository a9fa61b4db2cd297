"""Damage is noticed: a flipped byte or a cut in any file is refused by name, and the older checkpoint used."""

import random
from pathlib import Path

import pytest
import torch
from torch import nn

from litgpt.errors import UserError
from litgpt.files import DamagedFileError, verify_manifest
from litgpt.store.checkpoint_load import find_checkpoint, find_latest, load_checkpoint
from litgpt.store.checkpoint_save import Checkpoints

FILES = [
    "manifest.json",
    "model_config.yaml",
    "progress.json",
    "recipe.yaml",
    "shard-00000-of-00001.safetensors",
    "tokenizer.json",
]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a run with two checkpoints."""
    checkpoints = Checkpoints(tmp_path)
    model = nn.Linear(5, 6)
    optimizer = torch.optim.AdamW(model.parameters())
    for step in (1, 2):
        model(torch.randn(3, 5)).sum().backward()
        optimizer.step()
        files = {name: f"{name}: {step}\n" for name in ("model_config.yaml", "recipe.yaml", "tokenizer.json")}
        checkpoints.save(step, model, optimizer, {"tokens": step}, files)
    checkpoints.commit()
    assert sorted(path.name for path in (tmp_path / "step-00000002").iterdir()) == FILES
    return tmp_path


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[random.randrange(len(content))] ^= 1 << random.randrange(8)
    path.write_bytes(bytes(content))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: random.randrange(path.stat().st_size)])


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [flip, cut, lengthen, empty, Path.unlink])
@pytest.mark.parametrize("name", FILES)
def test_damage_to_any_file_is_refused_by_its_name_and_the_older_checkpoint_used(
    run: Path, name: str, damage: object
) -> None:
    damage(run / "step-00000002" / name)  # type: ignore[operator]
    messages: list[str] = []
    latest = find_latest(run, messages.append)
    assert latest == run / "step-00000001"
    assert len(messages) == 1 and name in messages[0] and "step-00000002" in messages[0] and "\n" not in messages[0]
    assert load_checkpoint(latest, nn.Linear(5, 6))["tokens"] == 1
    with pytest.raises(UserError, match=name):
        find_checkpoint(run / "step-00000002", run)


def test_every_single_byte_of_a_manifest_counts(run: Path) -> None:
    folder = run / "step-00000002"
    manifest = (folder / "manifest.json").read_bytes()
    for position in range(len(manifest)):
        content = bytearray(manifest)
        content[position] ^= 0x04
        (folder / "manifest.json").write_bytes(bytes(content))
        with pytest.raises(DamagedFileError):
            verify_manifest(folder)


def test_without_one_that_verifies_there_is_none(run: Path) -> None:
    for step in (1, 2):
        flip(run / f"step-0000000{step}" / "progress.json")
    messages: list[str] = []
    assert find_latest(run, messages.append) is None
    assert len(messages) == 2
