"""The tokens of images as codes in a vocabulary: where images are in a text, and what may follow in one.

Axes: V vocabulary.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from operator import or_
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class CodeTokens:
    """The ids of the tokens of images.

    Attributes:
        begin, end: of the tokens around an image.
        first: of code 0; the others follow it.
        codes: number of different codes.
        places: codes of an image, row by row.
        lead: tokens between the first one and the codes; the last of them is in images alone.
        row_end: of the token after each row; None for none.
        tail: tokens between the codes and the last one.
    """

    begin: int
    end: int
    first: int
    codes: int
    places: int
    lead: tuple[int, ...] = ()
    row_end: int | None = None
    tail: tuple[int, ...] = ()

    @cached_property
    def template(self) -> tuple[int | None, ...]:
        """The tokens of an image, and None for a code."""
        side = math.isqrt(self.places)
        rows: tuple[int | None, ...] = (None,) * self.places
        if self.row_end is not None:
            rows = ((None,) * side + (self.row_end,)) * side
        return (self.begin, *self.lead, *rows, *self.tail, self.end)

    @cached_property
    def marks(self) -> tuple[int, ...]:
        """The tokens beside codes that are in images alone."""
        row_end = () if self.row_end is None else (self.row_end,)
        return (self.begin, *self.lead[-1:], *row_end, *self.tail, self.end)

    def write(self, codes: Iterable[int]) -> list[int]:
        """The tokens of an image."""
        rest = iter(codes)
        return [self.first + next(rest) if token is None else token for token in self.template]

    def read(self, ids: Sequence[int]) -> list[int] | None:
        """The codes of the tokens of an image; None if they are not those of one."""
        if len(ids) != len(self.template):
            return None
        pairs = list(zip(ids, self.template, strict=True))
        codes = [token - self.first for token, expected in pairs if expected is None]
        is_whole = all(token == expected for token, expected in pairs if expected is not None)
        return codes if is_whole and all(0 <= code < self.codes for code in codes) else None

    def find_images(self, ids: Sequence[int]) -> list[list[int]]:
        """The codes of the images in a text; one that is not complete is not listed."""
        starts = (number for number, token in enumerate(ids) if token == self.begin)
        read = (self.read(ids[start : start + len(self.template)]) for start in starts)
        return [codes for codes in read if codes is not None]

    def is_image(self, ids: Any) -> Any:
        """Which tokens, of a tensor or an array, are those of images alone; booleans of the same shape."""
        is_code = (ids >= self.first) & (ids < self.first + self.codes)
        return reduce(or_, (ids == mark for mark in self.marks), is_code)


class GridConstraint:
    """What may follow in one text; see `Constraint` of `litgpt.infer.sampling`.

    An image is its begin token, exactly as many codes as it has places with the tokens around them, and its end token;
    codes are nowhere else.

    Args:
        rows: V.
        image_first: whether the text begins with an image.
    """

    def __init__(self, tokens: CodeTokens, rows: int, *, image_first: bool = False) -> None:
        self.tokens, self._rows = tokens, rows
        self._place: int | None = 0 if image_first else None  # in the template of an image; None in text

    def allowed(self) -> Tensor:
        """The tokens that may follow, (V,) boolean on the CPU."""
        tokens, mask = self.tokens, torch.zeros(self._rows, dtype=torch.bool)
        codes = slice(tokens.first, tokens.first + tokens.codes)
        if self._place is None:
            mask[:] = True
            mask[codes] = False
            mask[[mark for mark in tokens.marks if mark != tokens.begin]] = False
        elif (token := tokens.template[self._place]) is None:
            mask[codes] = True
        else:
            mask[token] = True
        return mask

    def accept(self, token: int) -> None:
        """Continue after this token, which is an allowed one."""
        if self._place is None:
            self._place = 1 if token == self.tokens.begin else None
        else:
            self._place = self._place + 1 if self._place + 1 < len(self.tokens.template) else None
