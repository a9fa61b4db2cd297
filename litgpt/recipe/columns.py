"""Two columns of text in the width of a terminal."""

import textwrap
from collections.abc import Iterable

WIDTH = 80


def format_columns(rows: Iterable[tuple[str, str]], left: int) -> list[str]:
    """Format rows as indented lines of at most 80 characters; a long first column has a line of its own.

    Args:
        left: maximum width of the first column.
    """
    rows = list(rows)
    start = 4 + max((len(name) for name, _ in rows if len(name) <= left), default=left)
    lines = []
    for name, text in rows:
        head = f"  {name}".ljust(start)
        if len(name) > left:
            lines.append(f"  {name}")
            head = " " * start
        lines += textwrap.wrap(head + text, WIDTH, subsequent_indent=" " * start, break_on_hyphens=False) or [head]
    return lines
