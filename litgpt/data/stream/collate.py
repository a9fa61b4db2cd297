"""Collate samples to the arrays of a micro batch: concatenated in one row, or padded to equal length."""

from collections.abc import Sequence

import numpy as np

from litgpt.data.render.example import Example
from litgpt.data.stream.batch import IGNORE, BatchArrays


def collate_rows(
    rows: Sequence[Sequence[Example]], *, padding: bool, weighted: bool, channels: Sequence[str]
) -> BatchArrays:
    """Collate rows of samples: concatenated in one row with the `sample_ends` of each, or padded.

    Args:
        padding: stack the rows, padded on the right.
        weighted: include the weights of labels.
        channels: the names of the numbers in `channels`; empty to leave them out.
    """
    sizes = [sum(len(example.ids) for example in row) for row in rows]
    if padding:
        padded = [_concatenate(row, max(sizes), weighted, channels) for row in rows]
        return {name: np.concatenate([arrays[name] for arrays in padded]) for name in padded[0]}
    arrays = _concatenate([example for row in rows for example in row], sum(sizes), weighted, channels)
    if sum(map(len, rows)) == 1:  # one sample needs no mask
        del arrays["documents"], arrays["positions"]
    return arrays | {"sample_ends": np.cumsum(sizes)}


def _concatenate(examples: Sequence[Example], total: int, weighted: bool, channels: Sequence[str]) -> BatchArrays:
    """Concatenate samples to one row (1, total), padded on the right."""
    arrays: BatchArrays = {
        "ids": np.zeros((1, total), np.int64),
        "labels": np.full((1, total), IGNORE, np.int64),
        "documents": np.full((1, total), -1, np.int32),
        "positions": np.zeros((1, total), np.int64),
    }
    if weighted:
        arrays["weights"] = np.zeros((1, total), np.float32)
    if channels:
        arrays["channels"] = np.zeros((1, total), np.int32)
    start = 0
    for number, example in enumerate(examples):
        size = len(example.ids)
        tokens = np.s_[0, start : start + size]
        shifted = np.s_[0, start : start + size - 1]  # the last token has no next one
        arrays["ids"][tokens] = example.ids
        arrays["labels"][shifted] = np.where(example.weights[1:] > 0, example.ids[1:], IGNORE)
        arrays["documents"][tokens] = number
        arrays["positions"][tokens] = np.arange(size)
        if weighted:
            arrays["weights"][shifted] = example.weights[1:]
        if channels:
            arrays["channels"][tokens] = channels.index(example.channel or "default")
        start += size
    return arrays
