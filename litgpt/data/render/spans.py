"""Parts of a text, and the tokens that lie in them."""

import copy
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from litgpt.data.render.chat_template import GENERATION_MARKS


class Span(NamedTuple):
    """Characters `start` .. `stop`-1 of a text, and the weight of their tokens."""

    start: int
    stop: int
    weight: float


def count_common_prefix(one: str, other: str) -> int:
    """How many characters two texts begin with alike."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one.startswith(other[:middle]):
            low = middle
        else:
            high = middle - 1
    return low


def remove_marks(text: str) -> tuple[str, list[tuple[int, int]]]:
    """A text without GENERATION_MARKS, and where they stood."""
    pieces = re.split(f"([{GENERATION_MARKS[0]}{GENERATION_MARKS[1]}])", text)
    plain, blocks, opened = "", list[tuple[int, int]](), 0
    for piece in pieces:
        if piece == GENERATION_MARKS[0]:
            opened = len(plain)
        elif piece == GENERATION_MARKS[1]:
            blocks.append((opened, len(plain)))
        else:
            plain += piece
    return plain, blocks


def disable_offset_trimming(processor: Any) -> Any:
    """The same tokenizer, which counts the blanks that a token begins with as part of it."""
    from tokenizers import processors

    offsets = np.array(processor.encode("a b", add_special_tokens=False).offsets)
    if np.array_equal(offsets[1:, 0], offsets[:-1, 1]) and processor.truncation is None and processor.padding is None:
        return processor  # a copy of a large vocabulary takes a second
    processor = copy.deepcopy(processor)
    processor.post_processor = processors.Sequence([])  # it trims offsets, and adds tokens that templates write
    processor.no_truncation()
    processor.no_padding()
    return processor


def compute_token_weights(parts: Sequence[Span], offsets: np.ndarray) -> np.ndarray:
    """(T,) float32 weights of tokens: that of the last part that a token has a character of; 0 without one.

    Args:
        offsets: (T, 2) where each token starts and stops in the text.
    """
    weights = np.zeros(len(offsets), np.float32)
    starts, stops = offsets[:, 0], offsets[:, 1]
    for part in parts:
        if part.start < part.stop:
            low = np.searchsorted(stops, part.start, side="right")
            high = np.searchsorted(starts, part.stop, side="left")
            weights[low:high] = part.weight
    return weights
