"""How malloc of glibc treats memory that is freed, of which a training step on a CPU frees gigabytes a second."""

import ctypes
import os
import platform

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -2, -3, -8  # numbers of malloc.h
OPTIONS = {
    M_MMAP_THRESHOLD: 32 * 1024**2,  # the largest that glibc accepts
    M_TRIM_THRESHOLD: 2_000_000_000,
    M_TOP_PAD: 64 * 1024**2,
}


def return_freed_memory() -> None:
    """Return the memory that malloc keeps to the system; what is used again later then comes back as new pages."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def keep_freed_memory(*, shared: bool = False) -> bool:
    """Let malloc keep memory that is freed for the next allocation, instead of returning it to the system.

    Memory that was returned comes back as new pages, each with a page fault: by default that is every tensor of more
    than 128 kB to 32 MB, in every step. The process keeps at most 2 GB more than it uses. Settings in the environment
    (`MALLOC_TRIM_THRESHOLD_`, `GLIBC_TUNABLES` and others) are left as they are.

    Args:
        shared: also let all threads that start later allocate from one heap, so that a step uses what the threads of a
            tokenizer have freed. They wait for each other, so it is not for threads that serve requests.

    Returns:
        Whether it was set: only with glibc.
    """
    is_set = any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ)
    if is_set or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    options = OPTIONS | ({M_ARENA_MAX: 1} if shared else {})
    return all([mallopt(option, value) for option, value in options.items()])
