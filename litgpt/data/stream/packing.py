"""Fit samples of different lengths into rows of one length: truncate long ones, pack by best fit in O(n log n)."""

from bisect import bisect_left
from collections.abc import Sequence
from typing import Literal

import numpy as np

PackingStrategy = Literal["best_fit", "sequential"]
OnOverlong = Literal["drop", "truncate_left", "truncate_right", "split", "raise"]


def find_cut_starts(size: int, length: int, on_overlong: OnOverlong) -> Sequence[int]:
    """First tokens of the parts, of at most `length` tokens, that a sample of `size` > `length` tokens is cut into."""
    starts: dict[str, Sequence[int]] = {
        "drop": [],
        "truncate_right": [0],
        "truncate_left": [size - length],
        "split": range(0, size, length),
    }
    return starts[on_overlong]


def cut_slices(size: int, length: int, on_overlong: OnOverlong) -> list[slice]:
    """The parts, of at most `length` tokens, that a sample of `size` > `length` tokens is cut into."""
    if on_overlong == "truncate_left":
        return [slice(-length, None)]
    return [slice(start, start + length) for start in find_cut_starts(size, length, on_overlong)]


def pack_samples(
    lengths: Sequence[int] | np.ndarray, capacity: int, strategy: PackingStrategy = "best_fit"
) -> list[np.ndarray]:
    """Assign samples to rows; each sample is in exactly one row, and equal lengths give equal rows.

    `best_fit` takes the longest first, and places each into the fullest row with room (Johnson et al. 1974, at most
    11/9 of the optimal number of rows). `sequential` fills one row after the other in the order of the data.

    Args:
        lengths: tokens of each sample.
        capacity: tokens per row; a longer sample gets its own row.

    Returns:
        The indices of the samples in each row, int64.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    rows = _best_fit(sizes, capacity) if strategy == "best_fit" else _sequential(sizes, capacity)
    return [np.array(row, dtype=np.int64) for row in rows]


def _best_fit(sizes: np.ndarray, capacity: int) -> list[list[int]]:
    rows: list[list[int]] = []
    rooms: list[int] = []  # distinct free sizes of rows, ascending
    rows_with: dict[int, list[int]] = {}  # rows by free size
    for sample in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[sample])
        position = bisect_left(rooms, size)
        if position == len(rooms):
            row, room = len(rows), capacity
            rows.append([])
        else:
            room = rooms[position]
            row = rows_with[room].pop()
            if not rows_with[room]:
                del rows_with[room], rooms[position]
        rows[row].append(sample)
        if (left := room - size) > 0:
            if left not in rows_with:
                rooms.insert(bisect_left(rooms, left), left)
                rows_with[left] = []
            rows_with[left].append(row)
    return rows


def _sequential(sizes: np.ndarray, capacity: int) -> list[list[int]]:
    rows: list[list[int]] = []
    room = 0
    for sample, size in enumerate(sizes.tolist()):
        if size > room or not rows:
            rows.append([])
            room = capacity
        rows[-1].append(sample)
        room -= size
    return rows
