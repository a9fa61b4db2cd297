"""Two columns of text in the width of a terminal."""

import textwrap
from collections.abc import Iterable

WIDTH = 80


def format_columns(
    rows: Iterable[tuple[str, str]], left: int = WIDTH, *, indent: int = 2, start: int | None = None
) -> list[str]:
    """Format rows as lines of at most 80 characters; a long first column has a line of its own.

    Args:
        left: maximum width of the first column.
        indent: number of spaces before it.
        start: where the second column starts; None for two spaces after the first one.
    """
    rows, before = list(rows), " " * indent
    if start is None:
        start = indent + 2 + max((len(name) for name, _ in rows if len(name) <= left), default=left)
    lines = []
    for name, text in rows:
        head = f"{before}{name}".ljust(start)
        if len(name) > left:
            lines.append(f"{before}{name}")
            head = " " * start
        wrapper = textwrap.TextWrapper(
            WIDTH, subsequent_indent=" " * start, break_on_hyphens=False, break_long_words=False
        )
        lines += wrapper.wrap(head + text) or [head]
    return lines
