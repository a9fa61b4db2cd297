"""The exception for errors that the user can fix."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

RECIPE_KEY = re.compile(r"\w+(\.\w+)*")


class UserError(Exception):
    """An error that the user can fix, in one line: ``key: value is wrong; use another``, or a file in place of the key.

    Attributes:
        key: the recipe key that the message begins with; empty if it begins with anything else.
        detail: the message without that key.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message)
        key, separator, rest = message.partition(": ")
        self.key, self.detail = (key, rest) if separator and RECIPE_KEY.fullmatch(key) else ("", message)

    def __str__(self) -> str:
        return " ".join(super().__str__().split())


@contextmanager
def name_file(path: Path, group: str) -> Iterator[None]:
    """Name the file that settings were read from, and not the recipe's group of that name, in errors about a key."""
    try:
        yield
    except UserError as error:
        if not error.key.startswith(f"{group}."):
            raise
        raise UserError(f"{path}: {error.key.removeprefix(f'{group}.')}: {error.detail}") from None
