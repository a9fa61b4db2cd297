"""Rows of a stream out of samples of different lengths: laid end to end, packed, or padded, in a fixed order."""

import hashlib
import random
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from litgpt.data.cache.examples import CachedExamples
from litgpt.data.render.labels import Example
from litgpt.data.stream.batches import Arrays
from litgpt.data.stream.collate import collate_rows
from litgpt.data.stream.sampler import LengthGrouping, build_sampler
from litgpt.errors import UserError

OnOverlong = Literal["drop", "truncate_left", "truncate_right", "split", "raise"]


class SampleTable:
    """The samples of a run, none longer than the model reads.

    Args:
        files: where they are.
        chosen: (P, 2) file and sample number of each; a sample may be there several times.
        length: the most tokens of a sample.
        on_overlong: what becomes of longer ones: left out, cut at the left or the right, cut in several, or an error.

    Attributes:
        table: (N, 4) file, sample number, first token and the one behind the last.
        lengths: (N,) tokens of each.
        overlong: (F,) how many of `chosen` were longer, by file.
        untrained: (F,) how many were left out because nothing in them, or in what was left of them, is trained.
        left_out: how many were left out in all.

    Raises:
        UserError: at the first one that is longer, if that is an error; or if none is left.
    """

    def __init__(
        self, files: Sequence[CachedExamples], chosen: np.ndarray, length: int, on_overlong: OnOverlong = "drop"
    ) -> None:
        self.files, self.length, self.on_overlong = list(files), length, on_overlong
        sizes, targets = np.zeros(len(chosen), np.int64), np.zeros(len(chosen), np.int64)
        for number, file in enumerate(self.files):
            mine = chosen[:, 0] == number
            sizes[mine] = file.lengths()[chosen[mine, 1]]
            targets[mine] = file.targets()[chosen[mine, 1]]
        longer = sizes > length
        self.overlong = np.bincount(chosen[longer, 0], minlength=len(self.files))
        if longer.any() and on_overlong == "raise":
            raise UserError(
                f"data: a sample has {int(sizes.max())} tokens and {longer.sum()} have more than "
                f"train.max_seq_length: {length}; raise that, or set data.on_overlong: truncate_right"
            )
        fitting = np.column_stack([chosen, np.zeros_like(sizes), sizes])[~longer & (targets > 0)]
        cut = [
            self._cut(row, int(size), length, on_overlong)
            for row, size in zip(chosen[longer], sizes[longer], strict=True)
        ]
        kept = np.array([piece for pieces in cut for piece in pieces], np.int64).reshape(-1, 4)
        self.table = np.concatenate([fitting, kept]).astype(np.int64)
        untrained = ~longer & (targets == 0)
        untrained[longer] = [not pieces and on_overlong != "drop" for pieces in cut]
        self.untrained = np.bincount(chosen[untrained, 0], minlength=len(self.files))
        self.left_out = len(chosen) - len(fitting) - sum(map(bool, cut))
        self.lengths = self.table[:, 3] - self.table[:, 2]
        if not len(self.table):
            raise UserError(
                f"data: none of {len(chosen)} samples has an answer within train.max_seq_length: {length} tokens; the "
                f"longest has {int(sizes.max(initial=0))}: raise that"
            )

    def _cut(self, row: np.ndarray, size: int, length: int, how: OnOverlong) -> list[tuple[int, int, int, int]]:
        """The pieces of a sample that is too long which have anything to train."""
        starts: dict[str, Sequence[int]] = {
            "drop": [],
            "truncate_right": [0],
            "truncate_left": [size - length],
            "split": range(0, size, length),
        }
        file, number = int(row[0]), int(row[1])
        pieces = [(file, number, start, min(start + length, size)) for start in starts[how]]
        return [piece for piece in pieces if self.files[file].read(*piece[1:]).weights[1:].any()]

    def read(self, piece: int) -> Example:
        """Sample `piece`."""
        file, number, start, stop = self.table[piece].tolist()
        example = self.files[file].read(number, start, stop)
        return example if len(example.ids) <= self.length else self._cut_late(example)

    def _cut_late(self, example: Example) -> Example:
        """A sample that is found to be too long when it is read; one that is to be left out trains nothing."""
        kept = slice(-self.length, None) if self.on_overlong == "truncate_left" else slice(self.length)
        weights = example.weights[kept] * np.float32(self.on_overlong != "drop")
        return Example(example.ids[kept], weights, example.channel)


class SampleRows:
    """Samples in rows, another order of rows every epoch.

    Args:
        pieces: the samples.
        rows: numbers of the samples that share a row; None for one sample a row.
        seed: fixes the order; None keeps it.
        padding: lay the rows of a micro batch under one another, padded at the right, and not end to end in one.
        grouping: lay samples of near lengths side by side.

    Attributes:
        channels: the names of the numbers in `channels` of a batch; empty where there is but one without a name.
    """

    def __init__(
        self,
        pieces: SampleTable,
        rows: Sequence[np.ndarray] | None,
        seed: int | None,
        *,
        padding: bool = False,
        grouping: LengthGrouping | None = None,
    ) -> None:
        self.pieces, self.padding, self._seed = pieces, padding, seed
        self._members = np.arange(len(pieces.table)) if rows is None else np.concatenate(rows)
        sizes = np.ones(len(pieces.table), np.int64) if rows is None else np.array([len(row) for row in rows])
        self._begins = np.concatenate([[0], np.cumsum(sizes)])
        self.count = len(sizes)
        self.weighted = any(file.weighted for file in pieces.files)
        names = sorted({name or "default" for file in pieces.files for name in file.channels})
        self.channels: Sequence[str] = [] if names == ["default"] else names
        about = ([file.fingerprint for file in pieces.files], seed, padding, *([grouping] if grouping else []))
        content = pieces.table.tobytes() + self._members.tobytes() + self._begins.tobytes()
        self.fingerprint = hashlib.sha256(repr(about).encode() + content).hexdigest()[:16]
        self._grouping = grouping
        self._order = (0, self._order_of(0))

    def _order_of(self, epoch: int) -> Callable[[int], int]:
        lengths = np.add.reduceat(self.pieces.lengths[self._members], self._begins[:-1])
        return build_sampler(lengths, self._seed or 0, epoch, self._grouping)

    def members(self, index: int) -> list[int]:
        """The samples in row number `index` over all epochs."""
        epoch, within = divmod(index, self.count)
        if self._seed is not None:
            if self._order[0] != epoch:
                self._order = (epoch, self._order_of(epoch))
            within = self._order[1](within)
        return self._members[self._begins[within] : self._begins[within + 1]].tolist()

    def some(self, number: int, order: random.Random) -> list[tuple[int, list[Example]]]:
        """So many rows, drawn at random, with their numbers."""
        chosen = order.sample(range(self.count), min(number, self.count))
        return [(index, [self.pieces.read(piece) for piece in self.members(index)]) for index in chosen]

    def padded(self, number: int, most: int = 10_000) -> tuple[int, int]:
        """The places of the first epoch's micro batches of `number` rows, and how many of them are padding.

        Args:
            most: rows that are looked at.
        """
        counted = min(self.count, most)
        sizes = np.array([int(self.pieces.lengths[self.members(index)].sum()) for index in range(counted)])
        batches = np.split(sizes, range(number, counted, number))
        places = sum(int(batch.max()) * len(batch) for batch in batches)
        return places, places - int(sizes.sum())

    def micro_batch(self, first: int, number: int) -> Arrays:
        """Rows `first` .. `first + number - 1`: end to end in one row with the `stops` of each, or padded."""
        rows = [[self.pieces.read(piece) for piece in self.members(first + place)] for place in range(number)]
        return collate_rows(rows, padding=self.padding, weighted=self.weighted, channels=self.channels)
