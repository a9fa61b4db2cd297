"""Resident pages of libraries' code, most of which only their loading runs."""

import ctypes
import mmap
import re
from functools import cache
from pathlib import Path

MAPPING = re.compile(
    r"^(\w+)-(\w+) (\S{4}) \S+ \S+ \d+ +(/.*)\n"
    r"(?:\w+:.*\n)*?Anonymous: +(\d+) kB\n(?:\w+:.*\n)*?Swap: +(\d+) kB",
    re.MULTILINE,
)
"""A mapped file in `smaps`: first address, end, access, path, and kB that differ from it, in memory and in swap."""


@cache
def return_code_pages() -> None:
    """Unmap the pages of libraries' code and constants that this process has in memory, on Linux, the first time.

    Those in use are mapped again from the system's cache of files, without being read again. The others ran only while
    the libraries were loaded: on a machine without a GPU, most are constructors in the libraries of CUDA.

    Not while another thread loads or unloads a library, whose addresses may then be of other memory.
    """
    try:
        smaps = Path("/proc/self/smaps").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return  # another system, or a process that may not read it
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    for pages in list_code_pages(smaps):
        madvise(pages.start, len(pages), mmap.MADV_DONTNEED)


def list_code_pages(smaps: str) -> list[range]:
    """The addresses of libraries' mappings that equal their file: those with changed pages would lose the changes.

    Args:
        smaps: the text of `/proc/self/smaps`.
    """
    mappings = [match.groups() for match in MAPPING.finditer(smaps)]
    libraries = {path for _, _, access, path, *_ in mappings if "x" in access}
    return [
        range(int(first, 16), int(end, 16))
        for first, end, access, path, changed, swapped in mappings
        if path in libraries and "w" not in access and changed == swapped == "0"
    ]
