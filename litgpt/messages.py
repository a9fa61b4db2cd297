"""Lines to the user on stderr that every process of a run would print, and the first one on each machine does."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

mutes: list[bool] = []


def print_message(*lines: str) -> None:
    """Print lines to stderr, if there are any and this process is not muted."""
    if lines and not any(mutes):
        print(*lines, sep="\n", file=sys.stderr, flush=True)


@contextmanager
def mute_messages(*, muted: bool) -> Iterator[None]:
    """Print no messages inside the block if `muted`."""
    mutes.append(muted)
    try:
        yield
    finally:
        mutes.pop()
