import platform
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from litgpt.host_allocator import keep_freed_memory, list_code_pages, return_code_pages, return_freed_memory
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


def read_file_pages() -> int:
    """Bytes of the memory of this process that are pages of files."""
    return int(Path("/proc/self/statm").read_text().split()[2]) * resource.getpagesize()


def print_code_pages() -> None:
    """The bytes of files that a new process has before and after it returns pages of code, and a sum computed then."""
    before = read_file_pages()
    return_code_pages()
    print(before, read_file_pages(), (torch.ones(1_000) @ torch.ones(1_000, 10)).sum().item())


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


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="reads /proc of Linux")
def test_pages_of_libraries_are_returned_and_read_again_when_they_run() -> None:
    code = f"import {__name__} as module; module.print_code_pages()"  # a forked process would not have loaded torch
    output = subprocess.run([sys.executable, "-c", code], check=True, text=True, stdout=subprocess.PIPE).stdout
    before, after, total = map(float, output.split())
    assert after < before / 3
    assert total == 10_000


def test_pages_that_were_changed_or_can_be_are_kept() -> None:
    cases = [
        ("1000-2000", "r-xp", "/lib/libc.so.6", 0),
        ("2000-4000", "r--p", "/lib/libc.so.6", 0),
        ("4000-5000", "r--p", "/lib/libc.so.6", 4),  # relocated, then protected
        ("5000-6000", "rw-p", "/lib/libc.so.6", 0),
        ("6000-7000", "r-xp", "/lib/patched.so", 4),
        ("7000-8000", "r--p", "/data/model.safetensors", 0),
        ("8000-9000", "r-xp", "[vdso]", 0),
    ]
    smaps = "".join(
        f"{addresses} {access} 00000000 08:01 7      {path}\nSize: 8 kB\nAnonymous: {changed:>9} kB\nVmFlags: rd mr\n"
        for addresses, access, path, changed in cases
    )
    assert list_code_pages(smaps) == [range(0x1000, 0x2000), range(0x2000, 0x4000)]
