import platform
import resource
from pathlib import Path

import pytest
import torch

from litgpt.host_allocator import keep_freed_memory
from tests.processes import join_ranks, start_ranks


def add() -> torch.Tensor:
    return torch.ones(1_000_000) + 1  # 4 MB, twice


def hold_two() -> None:
    for _ in range(50):
        held = [add(), add()]
    del held


def count_faults() -> int:
    """The page faults of 100 allocations."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    hold_two()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def print_faults() -> None:
    """What `keep_freed_memory` returns in a new process, and the fewest page faults of several rounds.

    Memory is new in the first rounds; in how many of them depends on the addresses that the process happens to have.
    """
    is_set = keep_freed_memory()
    print(is_set, min(count_faults() for _ in range(8)))


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="an option of glibc")
def test_freed_memory_is_used_again_without_page_faults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert join_ranks(start_ranks(print_faults, folder=tmp_path)) == [0]
    is_set, faults = (tmp_path / "rank-0.log").read_text().split()
    assert is_set == "True"
    assert int(faults) < 1_000  # 7,000 to 100,000 without it
    monkeypatch.setenv("MALLOC_TOP_PAD_", "0")
    assert not keep_freed_memory()
