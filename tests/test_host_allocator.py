import platform
import resource
from pathlib import Path

import pytest
import torch

from litgpt.host_allocator import keep_freed_memory, return_freed_memory
from tests.processes import join_ranks, start_ranks


def add() -> torch.Tensor:
    return torch.ones(1_000_000) + 1  # 4 MB, twice


def hold_two() -> None:
    for _ in range(50):
        held = [add(), add()]
    del held


def read_resident() -> int:
    """Bytes of memory that this process has."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def print_resident() -> None:
    """The bytes that a new process has before and after it returns freed memory."""
    keep_freed_memory()
    held = [torch.ones(1_000_000) for _ in range(50)]  # 200 MB
    last = torch.ones(1_000_000)
    del held
    before = read_resident()
    return_freed_memory()
    print(before - read_resident(), last.sum().item())


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


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc of Linux")
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="an option of glibc")
def test_freed_memory_is_returned_also_below_what_is_in_use(tmp_path: Path) -> None:
    assert join_ranks(start_ranks(print_resident, folder=tmp_path)) == [0]
    returned, _ = (tmp_path / "rank-0.log").read_text().split()
    assert float(returned) > 150e6
