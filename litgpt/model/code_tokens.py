"""The tokens of images as codes in a vocabulary: where images are in a text, and what may follow in one.

Axes: V vocabulary.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
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
        places: codes of an image.
    """

    begin: int
    end: int
    first: int
    codes: int
    places: int

    def write(self, codes: Iterable[int]) -> list[int]:
        """The tokens of an image."""
        return [self.begin, *(self.first + code for code in codes), self.end]

    def find_images(self, ids: Sequence[int]) -> list[list[int]]:
        """The codes of the images in a text; one that is not complete is not listed."""
        images, stop = list[list[int]](), self.places + 1
        for start in (number for number, token in enumerate(ids) if token == self.begin):
            codes = [token - self.first for token in ids[start + 1 : start + stop]]
            is_whole = ids[start + stop : start + stop + 1] == [self.end]
            if is_whole and all(0 <= code < self.codes for code in codes):
                images.append(codes)
        return images

    def is_image(self, ids: Any) -> Any:
        """Which tokens, of a tensor or an array, are those of images and around them; booleans of the same shape."""
        return (ids == self.begin) | (ids == self.end) | ((ids >= self.first) & (ids < self.first + self.codes))


class GridConstraint:
    """What may follow in one text; see `Constraint` of `litgpt.infer.sampling`.

    An image is its begin token, exactly as many codes as it has places, and its end token; codes are nowhere else.

    Args:
        rows: V.
        image_first: whether the text begins with an image.
    """

    def __init__(self, tokens: CodeTokens, rows: int, *, image_first: bool = False) -> None:
        self.tokens, self._rows = tokens, rows
        self._missing: int | None = None  # places of the image that is being written; None in text
        self._begins = image_first

    def allowed(self) -> Tensor:
        """The tokens that may follow, (V,) boolean on the CPU."""
        tokens, mask = self.tokens, torch.zeros(self._rows, dtype=torch.bool)
        if self._begins:
            mask[tokens.begin] = True
        elif self._missing is None:
            mask[:] = True
            mask[tokens.first : tokens.first + tokens.codes] = False
            mask[tokens.end] = False
        elif self._missing:
            mask[tokens.first : tokens.first + tokens.codes] = True
        else:
            mask[tokens.end] = True
        return mask

    def accept(self, token: int) -> None:
        """Continue after this token, which is an allowed one."""
        self._begins = False
        if self._missing is None:
            self._missing = self.tokens.places if token == self.tokens.begin else None
        else:
            self._missing = self._missing - 1 if self._missing else None
