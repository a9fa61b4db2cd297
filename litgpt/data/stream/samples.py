"""Rows of samples of different lengths: concatenated, packed or padded, in a reproducible order."""

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from litgpt.data.cache.examples import CachedExamples
from litgpt.data.render.example import Example, PlacedMedium, shrink_range
from litgpt.data.stream.batch import BatchArrays, collate_rows
from litgpt.data.stream.batch_media import MediaLoader
from litgpt.data.stream.packing import OnOverlong, find_cut_starts
from litgpt.data.stream.sampler import FeistelPermutation, LengthGroupedSampler, LengthGrouping
from litgpt.errors import UserError

TableEntry = tuple[int, int, int, int, int]
"""A part of a sample: file, number, first token, end, and tokens."""


class SampleTable:
    """The samples of a run, none longer than the model's maximum length; of two answers, neither is.

    Args:
        files: the caches that hold them.
        chosen: (P, 2) file and sample number of each; a sample may occur several times.
        length: maximum tokens of a sample.
        on_overlong: how to treat longer ones: drop, truncate on the left or right, split, or raise.

    Attributes:
        table: (N, 4) file, sample number, first token and end.
        lengths: (N,) tokens of each.
        overlong: (F,) number of `chosen` that were longer, by file.
        untrained: (F,) number left out because they have no trained tokens, at least after truncation.
        left_out: number left out in all.
        none_left: why no sample is left; empty if one is.
        paired: whether samples have two answers.

    Raises:
        UserError: for a longer one under `raise`.
    """

    def __init__(
        self, files: Sequence[CachedExamples], chosen: np.ndarray, length: int, on_overlong: OnOverlong = "drop"
    ) -> None:
        self.files, self.length, self.on_overlong = list(files), length, on_overlong
        sizes, targets, splits = (np.zeros(len(chosen), np.int64) for _ in range(3))
        for number, file in enumerate(self.files):
            in_file = chosen[:, 0] == number
            numbers = chosen[in_file, 1]
            sizes[in_file], targets[in_file], splits[in_file] = (
                values[numbers] for values in (file.lengths(), file.targets(), file.splits())
            )
        self.paired = bool(splits.any())
        documents = np.column_stack([splits, sizes - splits])  # tokens of each answer
        longer = documents.max(1, initial=0) > length
        self.overlong = np.bincount(chosen[longer, 0], minlength=len(self.files))
        if longer.any() and on_overlong == "raise":
            raise UserError(
                f"data: a sample has {int(documents.max())} tokens and {longer.sum()} have more than "
                f"train.max_seq_length: {length}; increase it, or set data.on_overlong: truncate_right"
            )
        fitting = np.column_stack([chosen, np.zeros_like(sizes), sizes, sizes])[~longer & (targets > 0)]
        cut = [
            self._cut(int(file), int(number), int(size))
            for (file, number), size in zip(chosen[longer], sizes[longer], strict=True)
        ]
        kept = np.array([part for parts in cut for part in parts], np.int64).reshape(-1, 5)
        table = np.concatenate([fitting, kept]).astype(np.int64)
        self.table, self.lengths = np.ascontiguousarray(table[:, :4]), table[:, 4]
        untrained = ~longer & (targets == 0)
        untrained[longer] = [not parts and on_overlong != "drop" for parts in cut]
        self.untrained = np.bincount(chosen[untrained, 0], minlength=len(self.files))
        self.left_out = len(chosen) - len(fitting) - sum(map(bool, cut))
        none_left = (
            f"none of {len(chosen)} samples has an answer within train.max_seq_length: {length} tokens; the longest "
            f"has {int(documents.max(initial=0))}: increase it"
            if longer.any()
            else f"none of {len(chosen)} samples has trained tokens; set `loss` or `weight` of messages to train them"
        )
        self.none_left = "" if len(self.table) else none_left

    def _cut(self, file: int, number: int, size: int) -> list[TableEntry]:
        """Cut a sample that is too long; returns file, number, first token, end and tokens of parts with targets."""
        if self.paired:  # both answers are cut by the same rule when the sample is read
            example = self._truncate(self.files[file].read(number))
            return [(file, number, 0, size, len(example.ids))] if example.has_targets else []
        if media := self.files[file].read_media(number):
            return self._cut_around(file, number, size, media)
        starts = find_cut_starts(size, self.length, self.on_overlong)
        parts = [(file, number, start, min(start + self.length, size)) for start in starts]
        return [(*part, part[3] - part[2]) for part in parts if self.files[file].read(*part[1:]).has_targets]

    def _cut_around(self, file: int, number: int, size: int, media: Sequence[PlacedMedium]) -> list[TableEntry]:
        """Cut a sample with images, of which a part has all tokens or none."""
        if self.on_overlong == "truncate_left":
            ranges = [shrink_range(size - self.length, size, media)]
        else:
            ranges = list_ranges(size, self.length, media)
            if self.on_overlong != "split":
                ranges = ranges[: {"drop": 0, "truncate_right": 1}[self.on_overlong]]
            elif ranges and ranges[-1][1] < size:  # left out whole, which is counted
                ranges = []
        parts = [(file, number, start, stop, stop - start) for start, stop in ranges if start < stop]
        return [part for part in parts if self.files[file].read(*part[1:4]).has_targets]

    def read(self, index: int) -> Example:
        """Read sample `index` of the table."""
        file, number, start, stop = self.table[index].tolist()
        example = self.files[file].read(number, start, stop)
        return self._truncate(example) if example.longest > self.length else example

    def _truncate(self, example: Example) -> Example:
        """Truncate the documents of a sample; it is not trained under `drop`, or if one of them has no target left."""
        kept = slice(-self.length, None) if self.on_overlong == "truncate_left" else slice(self.length)
        part = example.take(kept)
        return replace(part, weights=part.weights * np.float32(self.on_overlong != "drop" and part.has_targets))


def list_ranges(size: int, length: int, media: Sequence[PlacedMedium]) -> list[tuple[int, int]]:
    """Consecutive parts of at most `length` tokens, up to the first image that is longer."""
    ranges, start = [], 0
    while start < size:
        _, stop = shrink_range(start, min(start + length, size), media)
        if stop <= start:
            break
        ranges.append((start, stop))
        start = stop
    return ranges


@dataclass(frozen=True)
class NullPrompts:
    """Which samples are trained without the text of their prompt, for guidance (Ho and Salimans 2022).

    Attributes:
        rate: their share.
        seed: of the choice, which is a function of it and of the sample's place, so that a resumed run makes the same.
    """

    rate: float
    seed: int

    def chooses(self, row: int, place: int) -> bool:
        """Whether the sample at a place in a row, by its number over all epochs, is one of them."""
        return random.Random(f"{self.seed}/{row}/{place}").random() < self.rate


class SampleRows:
    """Samples in rows, in a new order every epoch.

    Args:
        samples: the samples.
        rows: indices of the samples that share a row; None for one sample per row.
        seed: seed of the order; None keeps the given order.
        padding: stack the rows of a micro batch, padded on the right, instead of concatenating them.
        grouping: batch samples of similar lengths.
        value_name: name in `Batch.answer_values` of the numbers that belong to the answers; None for samples that are
            single documents.
        media: loads the images of a micro-batch; None for a model that reads none.
        null_prompts: which samples have a prompt without text; None for no sample.

    Attributes:
        channels: the names of the numbers in `channels` of a batch; empty for a single unnamed channel.
    """

    def __init__(
        self,
        samples: SampleTable,
        rows: Sequence[np.ndarray] | None,
        seed: int | None,
        *,
        padding: bool = False,
        grouping: LengthGrouping | None = None,
        value_name: str | None = None,
        media: MediaLoader | None = None,
        null_prompts: NullPrompts | None = None,
    ) -> None:
        self.media, self.null_prompts = media, null_prompts
        self.samples, self.padding, self._seed = samples, padding, seed
        self._members = np.arange(len(samples.table)) if rows is None else np.concatenate(rows)
        sizes = np.ones(len(samples.table), np.int64) if rows is None else np.array([len(row) for row in rows])
        self._row_starts = np.concatenate([[0], np.cumsum(sizes)])
        self.count = len(sizes)
        self.token_count = int(samples.lengths[self._members].sum())
        self.weighted = any(file.weighted for file in samples.files)
        names = sorted({name or "default" for file in samples.files for name in file.channels})
        self.channels: Sequence[str] = [] if names == ["default"] else names
        options = [option for option in (grouping, null_prompts) if option]
        settings = ([file.fingerprint for file in samples.files], seed, padding, *options)
        content = samples.table.tobytes() + self._members.tobytes() + self._row_starts.tobytes()
        self.fingerprint = hashlib.sha256(repr(settings).encode() + content).hexdigest()[:16]
        self._grouping, self.value_name = grouping, value_name
        self._sampler = (0, self._build_sampler(0))

    def _build_sampler(self, epoch: int) -> Callable[[int], int]:
        lengths = np.add.reduceat(self.samples.lengths[self._members], self._row_starts[:-1])
        if self._grouping is None:
            return FeistelPermutation(len(lengths), self._seed or 0, epoch)
        return LengthGroupedSampler(lengths, self._seed or 0, epoch, self._grouping)

    def list_samples(self, index: int) -> list[int]:
        """List the samples in row number `index` over all epochs."""
        epoch, row = divmod(index, self.count)
        if self._seed is not None:
            if self._sampler[0] != epoch:
                self._sampler = (epoch, self._build_sampler(epoch))
            row = self._sampler[1](row)
        return self._members[self._row_starts[row] : self._row_starts[row + 1]].tolist()

    def _read_row(self, index: int) -> list[Example]:
        examples = [self.samples.read(sample) for sample in self.list_samples(index)]
        if self.null_prompts is None:
            return examples
        chosen = (self.null_prompts.chooses(index, place) for place in range(len(examples)))
        return [example.drop_prompt() if drop else example for example, drop in zip(examples, chosen, strict=True)]

    def draw_rows(self, number: int, rng: random.Random) -> list[tuple[int, list[Example]]]:
        """Draw some rows at random, with their indices."""
        return [(index, self._read_row(index)) for index in rng.sample(range(self.count), min(number, self.count))]

    def count_padding(self, micro_batch_size: int, max_rows: int = 10_000) -> tuple[int, int]:
        """Number of tokens in the first epoch's micro batches, and how many of them are padding.

        Args:
            max_rows: number of rows that are counted.
        """
        counted = min(self.count, max_rows)
        sizes = [self._list_row_sizes(index) for index in range(counted)]
        batches = [
            np.concatenate(sizes[start : start + micro_batch_size]) for start in range(0, counted, micro_batch_size)
        ]
        total = sum(int(batch.max()) * len(batch) for batch in batches)
        return total, total - sum(int(batch.sum()) for batch in batches)

    def _list_row_sizes(self, index: int) -> np.ndarray:
        """Tokens of a row, or of each answer in it, which are rows of their own in a padded batch."""
        if self.value_name is None:
            return self.samples.lengths[self.list_samples(index)].sum(keepdims=True)
        return np.array([len(answer.ids) for sample in self._read_row(index) for answer in sample.documents])

    def micro_batch(self, first: int, size: int) -> BatchArrays:
        """Collate rows `first` .. `first + size - 1`."""
        rows = [self._read_row(first + offset) for offset in range(size)]
        rows, media = (rows, {}) if self.media is None else self.media.load(rows)
        arrays = collate_rows(
            rows, padding=self.padding, weighted=self.weighted, channels=self.channels, values=self.value_name
        )
        if media and self.media is not None:
            if self.value_name is not None:  # each answer is a document
                rows = [[answer] for row in rows for sample in row for answer in sample.documents]
            arrays |= media | self.media.build_positions(rows, arrays, padding=self.padding)
        return arrays
