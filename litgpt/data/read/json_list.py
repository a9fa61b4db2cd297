"""The members of a JSON list, one after the other, so that it may be larger than memory."""

import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

BLANKS = re.compile(r"[ \t\r\n]*")


def iter_json_list(pieces: Iterable[str]) -> Iterator[Any]:
    """The members of a list that comes in pieces.

    Raises:
        ValueError: where it is no JSON list.
        RecursionError: for a member that is nested too deeply.
    """
    text = _JsonReader(pieces)
    if text.take_mark() != "[":
        raise ValueError("a list begins with [")
    mark = ","
    if text.peek() == "]":
        mark = text.take_mark()
    while mark == ",":
        yield text.value()
        mark = text.take_mark()
    if mark != "]":
        raise ValueError(f"{mark!r} behind a member" if mark else "it ends within the list")
    if rest := text.peek():
        raise ValueError(f"{rest!r} behind the list")


class _JsonReader:
    """A text that is read as far as it is needed, and forgotten once it is used."""

    def __init__(self, pieces: Iterable[str]) -> None:
        self._pieces = iter(pieces)
        self._text, self._position, self._ended = "", 0, False

    def _read(self) -> None:
        """Read as much again as is there, so that a long value is not scanned too often."""
        parts = [self._text[self._position :]]
        wanted = 2 * len(parts[0]) + 1
        while not self._ended and sum(map(len, parts)) < wanted:
            piece = next(self._pieces, None)
            self._ended = piece is None
            parts.append(piece or "")
        self._text, self._position = "".join(parts), 0

    def peek(self) -> str:
        """The next character that is no blank; empty at the end."""
        while True:
            blanks = BLANKS.match(self._text, self._position)
            self._position = blanks.end() if blanks else self._position
            if self._position < len(self._text) or self._ended:
                return self._text[self._position : self._position + 1]
            self._read()

    def take_mark(self) -> str:
        """The next character that is no blank, which is used up."""
        mark = self.peek()
        self._position += len(mark)
        return mark

    def value(self) -> Any:
        """The JSON value that comes next."""
        self.peek()
        while True:
            try:
                value, end = json.JSONDecoder().raw_decode(self._text, self._position)
                if end < len(self._text) or self._ended:  # a number at the end may go on
                    self._position = end
                    return value
            except (ValueError, RecursionError):
                if self._ended:
                    raise
            self._read()
