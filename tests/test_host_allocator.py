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


def print_faults() -> None:
    """What `keep_freed_memory` returns in a new process, and the page faults of 100 allocations after the first 200."""
    is_set = keep_freed_memory()
    hold_two()  # the most memory that is in use at once depends on the order of allocations, until it repeats itself
    hold_two()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    hold_two()
    print(is_set, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="an option of glibc")
def test_freed_memory_is_used_again_without_page_faults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert join_ranks(start_ranks(print_faults, folder=tmp_path)) == [0]
    is_set, faults = (tmp_path / "rank-0.log").read_text().split()
    assert is_set == "True"
    assert int(faults) < 1_000  # 50,000 without it
    monkeypatch.setenv("MALLOC_TOP_PAD_", "0")
    assert not keep_freed_memory()
