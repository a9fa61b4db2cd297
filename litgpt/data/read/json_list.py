"""The members of a JSON list, one after the other, so that it may be larger than memory."""

import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

BLANKS = re.compile(r"[ \t\r\n]*")


def members(pieces: Iterable[str]) -> Iterator[Any]:
    """The members of a list that comes in pieces.

    Raises:
        ValueError: where it is no JSON list.
        RecursionError: for a member that is nested too deeply.
    """
    text = _Text(pieces)
    if text.next_mark() != "[":
        raise ValueError("a list begins with [")
    mark = ","
    if text.peek() == "]":
        mark = text.next_mark()
    while mark == ",":
        yield text.value()
        mark = text.next_mark()
    if mark != "]":
        raise ValueError(f"{mark!r} behind a member" if mark else "it ends within the list")
    if rest := text.peek():
        raise ValueError(f"{rest!r} behind the list")


class _Text:
    """A text that is read as far as it is needed, and forgotten once it is used."""

    def __init__(self, pieces: Iterable[str]) -> None:
        self._pieces = iter(pieces)
        self._text, self._place, self._ended = "", 0, False

    def _read(self) -> None:
        """Read as much again as is there, so that a long value is not scanned too often."""
        parts = [self._text[self._place :]]
        wanted = 2 * len(parts[0]) + 1
        while not self._ended and sum(map(len, parts)) < wanted:
            piece = next(self._pieces, None)
            self._ended = piece is None
            parts.append(piece or "")
        self._text, self._place = "".join(parts), 0

    def peek(self) -> str:
        """The next character that is no blank; empty at the end."""
        while True:
            blanks = BLANKS.match(self._text, self._place)
            self._place = blanks.end() if blanks else self._place
            if self._place < len(self._text) or self._ended:
                return self._text[self._place : self._place + 1]
            self._read()

    def next_mark(self) -> str:
        """The next character that is no blank, which is used up."""
        mark = self.peek()
        self._place += len(mark)
        return mark

    def value(self) -> Any:
        """The JSON value that comes next."""
        self.peek()
        while True:
            try:
                value, end = json.JSONDecoder().raw_decode(self._text, self._place)
                if end < len(self._text) or self._ended:  # a number at the end may go on
                    self._place = end
                    return value
            except (ValueError, RecursionError):
                if self._ended:
                    raise
            self._read()
