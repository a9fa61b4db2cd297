"""A disk that fills up during a save: one clear line, the older checkpoint intact, the run ends or goes on as asked."""

import errno
import io
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from litgpt.errors import UserError
from litgpt.store.checkpoint_load import find_latest, load_checkpoint
from litgpt.store.checkpoint_save import Checkpoints


def save(out_dir: Path, step: int, width: int, **settings: Any) -> Path | None:
    checkpoints = Checkpoints(out_dir, **settings)
    model = nn.Linear(width, width)
    checkpoints.save(step, model, None, {}, {"recipe.yaml": "seed: 1\n"})
    return checkpoints.commit()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on a file system of one megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small file system needs root; the test below fails each write instead")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_full_disk_ends_the_run_or_not_as_asked(small_disk: Path, asynchronous: bool) -> None:
    older = save(small_disk, 1, 300)
    with pytest.raises(UserError, match=r"not saved .*No space left.*older checkpoints are intact.*on_error") as caught:
        save(small_disk, 2, 600, asynchronous=asynchronous)
    assert "\n" not in str(caught.value)
    messages: list[str] = []
    assert save(small_disk, 3, 600, on_error="continue", warn=messages.append, asynchronous=asynchronous) is None
    assert len(messages) == 1 and "No space left" in messages[0]
    assert [path.name for path in small_disk.iterdir()] == ["step-00000001"]
    assert find_latest(small_disk) == older
    assert save(small_disk, 4, 300, keep=1) == small_disk / "step-00000004", "the space of a failed save is free again"


class FullFile:
    """A file whose writes fail from a given one on."""

    def __init__(self, file: Any, left: list[int]) -> None:
        self.file = file
        self.left = left

    def write(self, block: Any) -> int:
        self.left[0] -= 1
        if self.left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        written: int = self.file.write(block)
        return written

    def __enter__(self) -> "FullFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def test_a_failure_at_any_single_write_leaves_the_older_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    older = save(tmp_path, 1, 4)
    real_open = io.open
    left = [0]

    def full_open(file: Any, mode: str = "r", *rest: Any, **settings: Any) -> Any:
        opened = real_open(file, mode, *rest, **settings)
        return FullFile(opened, left) if "w" in mode and str(file).startswith(str(tmp_path)) else opened

    monkeypatch.setattr(io, "open", full_open)
    failures = 0
    while failures < 100:
        left[0] = failures
        messages: list[str] = []
        done = save(tmp_path, 2, 4, on_error="continue", warn=messages.append)
        if done is not None:
            break
        assert len(messages) == 1 and "No space left" in messages[0]
        assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
        assert find_latest(tmp_path) == older
        failures += 1
    assert 5 <= failures < 100, "progress, recipe, header, two tensors and the manifest are written one by one"
    assert find_latest(tmp_path) == done
    assert done is not None and torch.is_tensor(load_checkpoint(done, nn.Linear(4, 4)) and torch.zeros(1))
