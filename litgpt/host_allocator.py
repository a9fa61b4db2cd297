"""Memory of the process that is not of tensors: what malloc of glibc keeps when it is freed, and code of libraries.

A training step on a CPU frees gigabytes a second.
"""

import ctypes
import mmap
import os
import platform
import re
from functools import cache
from pathlib import Path

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -2, -3, -8  # numbers of malloc.h
OPTIONS = {
    M_MMAP_THRESHOLD: 32 * 1024**2,  # the largest that glibc accepts
    M_TRIM_THRESHOLD: 2_000_000_000,
    M_TOP_PAD: 64 * 1024**2,
}

MAPPING = re.compile(r"^(\w+)-(\w+) (\S{4}) \S+ \S+ \d+ +(/.*)\n(?:\w+:.*\n)*?Anonymous: +(\d+) kB", re.MULTILINE)
"""A mapped file in `smaps`: its first address and its end, access, path, and kB that differ from the file."""


def return_freed_memory() -> None:
    """Return the memory that malloc keeps to the system; what is used again later then comes back as new pages."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


@cache
def return_code_pages() -> None:
    """Unmap the pages of libraries' code and constants that this process has in memory, on Linux, the first time.

    Those in use are mapped again from the system's cache of files, without being read again. The others ran only while
    the libraries were loaded: on a machine without a GPU, most are constructors in the libraries of CUDA.
    """
    smaps = Path("/proc/self/smaps")
    if not smaps.exists():
        return
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    for pages in list_code_pages(smaps.read_text()):
        madvise(pages.start, len(pages), mmap.MADV_DONTNEED)


def list_code_pages(smaps: str) -> list[range]:
    """The addresses of libraries' mappings that equal their file: those with changed pages would lose the changes.

    Args:
        smaps: the text of `/proc/self/smaps`.
    """
    mappings = [match.groups() for match in MAPPING.finditer(smaps)]
    libraries = {path for *_, access, path, _ in mappings if "x" in access}
    return [
        range(int(first, 16), int(end, 16))
        for first, end, access, path, changed in mappings
        if path in libraries and "w" not in access and changed == "0"
    ]


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
