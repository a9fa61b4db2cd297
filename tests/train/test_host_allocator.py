import platform
import subprocess
import sys

import pytest

from litgpt.train.host_allocator import keep_freed_memory

COUNT_FAULTS = """
import resource
import torch
from litgpt.train.host_allocator import keep_freed_memory

is_set = keep_freed_memory()
def add():
    return torch.ones(1_000_000) + 1  # 4 MB, twice

def hold_two():
    for _ in range(50):
        held = [add(), add()]

hold_two()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
hold_two()
print(is_set, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def count_faults() -> tuple[str, int]:
    """What `keep_freed_memory` returned in a new process, and the page faults of 100 allocations after the first."""
    done = subprocess.run([sys.executable, "-c", COUNT_FAULTS], check=True, text=True, stdout=subprocess.PIPE)
    is_set, faults = done.stdout.split()
    return is_set, int(faults)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="an option of glibc")
def test_freed_memory_is_used_again_without_page_faults(monkeypatch):
    is_set, faults = count_faults()
    assert is_set == "True"
    assert faults < 1_000  # 1,900 to 100,000 without it
    monkeypatch.setenv("MALLOC_TOP_PAD_", "0")
    assert not keep_freed_memory()
