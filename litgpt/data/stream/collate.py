"""Samples as the arrays of a micro batch: end to end in one row, or padded under one another."""

from collections.abc import Sequence

import numpy as np

from litgpt.data.render.labels import Example
from litgpt.data.stream.batch import IGNORE
from litgpt.data.stream.batches import Arrays


def collate_rows(
    rows: Sequence[Sequence[Example]], *, padding: bool, weighted: bool, channels: Sequence[str]
) -> Arrays:
    """Rows of samples: end to end in one row with the `stops` of each, or padded.

    Args:
        padding: lay the rows under one another, padded at the right.
        weighted: give the weights of labels.
        channels: the names of the numbers in `channels`; empty to leave them out.
    """
    sizes = [sum(len(example.ids) for example in row) for row in rows]
    if padding:
        apart = [_concatenate(row, max(sizes), weighted, channels) for row in rows]
        return {name: np.concatenate([one[name] for one in apart]) for name in apart[0]}
    arrays = _concatenate([example for row in rows for example in row], sum(sizes), weighted, channels)
    if sum(map(len, rows)) == 1:  # one sample needs no mask
        del arrays["documents"], arrays["positions"]
    return arrays | {"stops": np.cumsum(sizes)}


def _concatenate(examples: Sequence[Example], total: int, weighted: bool, channels: Sequence[str]) -> Arrays:
    """Samples end to end in one row (1, total); what is left of it is padding."""
    arrays: Arrays = {
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
        place = np.s_[0, start : start + size]
        before = np.s_[0, start : start + size - 1]  # the last token has no next one
        arrays["ids"][place] = example.ids
        arrays["labels"][before] = np.where(example.weights[1:] > 0, example.ids[1:], IGNORE)
        arrays["documents"][place] = number
        arrays["positions"][place] = np.arange(size)
        if weighted:
            arrays["weights"][before] = example.weights[1:]
        if channels:
            arrays["channels"][place] = channels.index(example.channel or "default")
        start += size
    return arrays
