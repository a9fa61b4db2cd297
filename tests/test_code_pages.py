"""Pages of libraries' code are returned before the first step, and nothing that differs from a file is."""

import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from litgpt.code_pages import list_code_pages, return_code_pages


def read_file_pages() -> int:
    """Bytes of the memory of this process that are pages of files."""
    return int(Path("/proc/self/statm").read_text().split()[2]) * resource.getpagesize()


def print_code_pages() -> None:
    """The bytes of files that a new process has before and after it returns pages of code, and a sum computed then."""
    before = read_file_pages()
    return_code_pages()
    print(before, read_file_pages(), (torch.ones(1_000) @ torch.ones(1_000, 10)).sum().item())


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="reads /proc of Linux")
def test_pages_of_libraries_are_returned_and_read_again_when_they_run() -> None:
    code = f"import {__name__} as module; module.print_code_pages()"  # a forked process would not have loaded torch
    output = subprocess.run([sys.executable, "-c", code], check=True, text=True, stdout=subprocess.PIPE).stdout
    before, after, total = map(float, output.split())
    assert after < before / 3
    assert total == 10_000


def test_pages_that_were_changed_or_can_be_are_kept() -> None:
    cases = [
        ("1000-2000", "r-xp", "/lib/libc.so.6", 0, 0),
        ("2000-4000", "r--p", "/lib/libc.so.6", 0, 0),
        ("4000-5000", "r--p", "/lib/libc.so.6", 4, 0),  # relocated, then protected
        ("5000-6000", "rw-p", "/lib/libc.so.6", 0, 0),
        ("6000-7000", "r-xp", "/lib/patched.so", 4, 0),
        ("7000-8000", "r--p", "/data/model.safetensors", 0, 0),
        ("8000-9000", "r-xp", "[vdso]", 0, 0),
        ("9000-a000", "r--p", "/lib/libc.so.6", 0, 4),  # relocated, and in swap
    ]
    smaps = "".join(
        f"{addresses} {access} 00000000 08:01 7      {path}\nSize: 8 kB\n"
        f"Anonymous: {changed:>9} kB\nKSM: 0 kB\nSwap: {swapped:>9} kB\nVmFlags: rd mr\n"
        for addresses, access, path, changed, swapped in cases
    )
    assert list_code_pages(smaps) == [range(0x1000, 0x2000), range(0x2000, 0x4000)]
