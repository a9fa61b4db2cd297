"""Spans of a text, and the tokens in them."""

import copy
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from litgpt.data.render.chat_template import GENERATION_MARKS


class Span(NamedTuple):
    """Characters `start` .. `stop`-1 of a text, and the loss weight of their tokens."""

    start: int
    stop: int
    weight: float


def count_common_prefix(first: str, second: str) -> int:
    """Count the characters of the common prefix of two texts."""
    low, high = 0, min(len(first), len(second))
    while low < high:
        middle = (low + high + 1) // 2
        if first.startswith(second[:middle]):
            low = middle
        else:
            high = middle - 1
    return low


def remove_marks(text: str) -> tuple[str, list[tuple[int, int]]]:
    """Remove GENERATION_MARKS from a text; returns it with the spans between them."""
    pieces = re.split(f"([{GENERATION_MARKS[0]}{GENERATION_MARKS[1]}])", text)
    plain, blocks, start = "", list[tuple[int, int]](), 0
    for piece in pieces:
        if piece == GENERATION_MARKS[0]:
            start = len(plain)
        elif piece == GENERATION_MARKS[1]:
            blocks.append((start, len(plain)))
        else:
            plain += piece
    return plain, blocks


def disable_offset_trimming(processor: Any) -> Any:
    """Copy a tokenizer so that the offsets of a token include its leading white space."""
    from tokenizers import processors

    offsets = np.array(processor.encode("a b", add_special_tokens=False).offsets)
    if np.array_equal(offsets[1:, 0], offsets[:-1, 1]) and processor.truncation is None and processor.padding is None:
        return processor  # copying a large vocabulary takes a second
    processor = copy.deepcopy(processor)
    processor.post_processor = processors.Sequence([])  # it trims offsets, and adds tokens that templates already write
    processor.no_truncation()
    processor.no_padding()
    return processor


def compute_token_weights(spans: Sequence[Span], offsets: np.ndarray) -> np.ndarray:
    """(T,) float32 loss weights: each token takes that of the last span it overlaps; 0 without one.

    Args:
        offsets: (T, 2) start and end of each token in the text.
    """
    weights = np.zeros(len(offsets), np.float32)
    starts, stops = offsets[:, 0], offsets[:, 1]
    for span in spans:
        if span.start < span.stop:
            low = np.searchsorted(stops, span.start, side="right")
            high = np.searchsorted(starts, span.stop, side="left")
            weights[low:high] = span.weight
    return weights
