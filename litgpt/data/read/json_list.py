"""Parse a JSON list item by item, so that it may be larger than memory."""

import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

WHITE_SPACE = re.compile(r"[ \t\r\n]*")


def iter_json_list(chunks: Iterable[str]) -> Iterator[Any]:
    """Iterate over the items of a JSON list that is given in chunks of text.

    Raises:
        ValueError: if it is not a JSON list.
        RecursionError: if an item is nested too deeply.
    """
    reader = _JsonReader(chunks)
    if reader.read_character() != "[":
        raise ValueError("a list starts with [")
    character = ","
    if reader.peek() == "]":
        character = reader.read_character()
    while character == ",":
        yield reader.read_value()
        character = reader.read_character()
    if character != "]":
        raise ValueError(f"{character!r} after an item" if character else "truncated list")
    if rest := reader.peek():
        raise ValueError(f"{rest!r} after the list")


class _JsonReader:
    """Buffers the text between the current position and the last chunk read."""

    def __init__(self, chunks: Iterable[str]) -> None:
        self._chunks = iter(chunks)
        self._text, self._position, self._ended = "", 0, False

    def _read(self) -> None:
        """Double the buffer, so that a long value is scanned a logarithmic number of times."""
        parts = [self._text[self._position :]]
        wanted = 2 * len(parts[0]) + 1
        while not self._ended and sum(map(len, parts)) < wanted:
            chunk = next(self._chunks, None)
            self._ended = chunk is None
            parts.append(chunk or "")
        self._text, self._position = "".join(parts), 0

    def peek(self) -> str:
        """Return the next character that is not white space; empty at the end."""
        while True:
            spaces = WHITE_SPACE.match(self._text, self._position)
            self._position = spaces.end() if spaces else self._position
            if self._position < len(self._text) or self._ended:
                return self._text[self._position : self._position + 1]
            self._read()

    def read_character(self) -> str:
        """Consume the next character that is not white space."""
        character = self.peek()
        self._position += len(character)
        return character

    def read_value(self) -> Any:
        """Parse the next JSON value."""
        self.peek()
        while True:
            try:
                value, end = json.JSONDecoder().raw_decode(self._text, self._position)
                if end < len(self._text) or self._ended:  # a number at the end of the buffer may continue
                    self._position = end
                    return value
            except (ValueError, RecursionError):
                if self._ended:
                    raise
            self._read()
