"""What data modules of conversations and instructions share: samples made once, shared out, and laid in rows."""

import hashlib
import random
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from litgpt.data.read.conversation import Conversation, iter_texts
from litgpt.data.read.fields import BadRow
from litgpt.data.read.row_sources import DataSource
from litgpt.data.stream.packing import PackingStrategy, compute_fill_ratio, pack_samples
from litgpt.data.stream.sampler import FeistelPermutation, LengthGrouping
from litgpt.errors import UserError
from litgpt.recipe.bounds import Count, Position, Seed, check_numbers
from litgpt.recipe.data import BatchShape, DataModule, Stream

if TYPE_CHECKING:
    from litgpt.data.cache.examples import CachedExamples, Renderer, RowSet
    from litgpt.data.stream.samples import SampleRows, SampleTable

OnError = Literal["raise", "drop", "warn"]
OnOverlong = Literal["drop", "truncate_left", "truncate_right", "split", "raise"]


@dataclass(frozen=True)
class Packing:
    """Rows that hold as many samples as fit; attention stays inside each."""

    enabled: bool = False
    """Fill rows ahead; a row counts as one sample of the batch."""
    length: Count | None = None
    """Tokens of a row; null for train.max_seq_length."""
    strategy: PackingStrategy = "best_fit"
    """best_fit fills rows best; sequential keeps the order of the data."""

    def __post_init__(self) -> None:
        check_numbers(self, "data.packing.")


@dataclass(frozen=True)
class DatasetEntry:
    """One set of rows of a run.

    Attributes:
        rows: what is in it.
        part: which part of the run it is for; both splits it.
        source: how much of it is taken.
    """

    rows: "RowSet"
    source: DataSource
    part: Literal["both", "train", "val"] = "both"


@dataclass(kw_only=True)
class FinetuningData(DataModule):
    """What the modules of conversations share: make or find the samples, share them out, and lay them in rows."""

    seed: Seed = 42
    """Fixes the order of the samples, and which are for validation."""
    num_workers: Position = 4
    """Processes that read ahead; the batches do not depend on it."""
    on_error: OnError = "raise"
    """At a row that is no conversation: raise, drop it and count it, or warn, which also shows the first few."""
    on_overlong: OnOverlong = "truncate_right"
    """At a sample longer than train.max_seq_length: drop, truncate_left, truncate_right, split or raise."""
    packing: Packing = field(default_factory=Packing)
    """Fill rows with several samples."""
    tokenize: Literal["ahead", "lazy"] = "ahead"
    """ahead makes all samples once and keeps them on disk; lazy makes each when it is read, for very large sets."""
    padding: bool = False
    """Lay samples under one another, padded to the longest, and not end to end."""
    group_by_length: Position = 0
    """Sort the samples of so many global batches by length together, so that those of a micro-batch are about as long;
    0 does not, 50 is usual."""

    # what a run adds later; untyped, because the types of settings are looked up and these need torch
    tokenizer: Any = field(default=None, init=False, repr=False)
    made: Any = field(default=None, init=False, repr=False)
    padded: Any = field(default=None, init=False, repr=False)
    cut: Any = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        check_numbers(self, "data.")
        if self.group_by_length and self.packing.enabled:
            raise UserError(
                f"data.group_by_length: {self.group_by_length}, but rows that are filled are equally long; set "
                "data.group_by_length: 0, or data.packing.enabled: false"
            )
        if self.tokenize == "lazy":
            from litgpt.data.cache.lazy_examples import check_lazy

            check_lazy(self.packing.enabled, self.on_overlong, self.group_by_length)

    def connect(self, tokenizer: Any = None, batch_size: int = 1, max_seq_length: int | None = None) -> None:
        """Keep the tokenizer; batch size and length come with the shape of a stream."""
        self.tokenizer = tokenizer

    def sets(self) -> "list[DatasetEntry]":
        """The rows that it reads."""
        raise UserError(f"data: {type(self).__name__} names no rows")

    def renders(self) -> "Renderer":
        """What makes samples of conversations."""
        raise UserError(f"data: {type(self).__name__} does not say how conversations are written")

    def cache(self) -> Path:
        """The folder that the samples go to."""
        raise UserError(f"data: {type(self).__name__} names no folder for its samples")

    def default_fraction(self) -> float:
        """The share of the rows for validation, where their source does not say."""
        return 0.0

    def sizes_of(self, files: "list[tuple[DatasetEntry, CachedExamples]]", counts: list[int]) -> list[int]:
        """How many samples an epoch has of each training set; `counts` are there."""
        return [wanted(entry.source, count) for (entry, _), count in zip(files, counts, strict=True)]

    def prepare_data(self) -> None:
        """Download and tokenize, or find that it is done."""
        from litgpt.data.cache.examples import prepare_examples

        if self.tokenizer is None:
            raise UserError(
                f"tokenizer_dir: missing, but data: {type(self).__name__} is text; give a tokenizer's folder"
            )
        renders = self.renders()
        self.made = [
            (entry, prepare_examples(entry.rows, renders, self.cache(), self.on_error, self.tokenize))
            for entry in self.sets()
        ]

    def setup(self, stage: str = "") -> None:
        """Open the samples."""
        if self.made is None:
            self.prepare_data()

    def training_documents(self) -> Iterable[str]:
        """What is said in the training rows, message by message."""
        for entry in self.sets():
            if entry.part != "val":
                yield from iter_texts(iter_conversations(entry.rows))

    def report(self) -> dict[str, Any]:
        """The rows that were left out, by the name of their set; JSON values."""
        found: dict[str, Any] = {}
        for entry, file in self.made:
            name, report = entry.rows.name, {**asdict(file.report), "reasons": dict(file.report.reasons)}
            for number, key in enumerate(("overlong", "untrained")):
                report[key] = sum(part[name][number] for part in self.cut.values() if name in part)
            found[name] = report
        return found | ({"padding": self.padded} if self.padded else {})

    def encode_example_prompt(self, which: Literal["first", "random"] | int, seed: int) -> list[int]:
        """What the model reads before the first answer of one of the conversations, by its number among all."""
        found = next(islice(self.conversations(), self.place_of(which, seed), None), None)
        try:
            return [] if found is None else self.renders().question(found)
        except BadRow:
            return []  # one of those that were left out and counted

    def conversations(self) -> Iterator[Conversation]:
        """All that can be read, from the start."""
        return chain.from_iterable(iter_conversations(entry.rows) for entry in self.sets())

    def place_of(self, which: Literal["first", "random"] | int, seed: int) -> int:
        """The number of one of the conversations.

        Raises:
            UserError: if there are not so many.
        """
        count = sum(file.count for _, file in self.made)
        number = {"first": 0, "random": random.Random(seed).randrange(count)}.get(str(which), which)
        if not 0 <= int(number) < count:
            raise UserError(f"eval.evaluate_example: {which} of {count} conversations; give 0 to {count - 1}")
        return int(number)

    def longest(self) -> int:
        """The tokens of the longest sample."""
        return max(int(file.lengths().max(initial=0)) for _, file in self.made)

    def train_stream(self, shape: BatchShape) -> Stream:
        """Endless micro batches of the training samples."""
        from litgpt.data.stream.batches import TrainStream
        from litgpt.data.stream.samples import SampleRows

        pieces = self._pieces(shape, "train")
        assert pieces is not None
        grouping = LengthGrouping(shape.global_batch_size, self.group_by_length) if self.group_by_length else None
        rows = SampleRows(pieces, self._packed(pieces, shape), self.seed, padding=self.padding, grouping=grouping)
        if self.padding and self.tokenize == "ahead" and shape.rank == 0:
            self._count_padding(rows, shape)
        return TrainStream(rows, shape, workers=self.num_workers)

    def val_stream(self, shape: BatchShape) -> Stream | None:
        """One pass over the validation samples; None if there are none."""
        from litgpt.data.stream.batches import ValStream
        from litgpt.data.stream.samples import SampleRows

        pieces = self._pieces(shape, "val")
        return None if pieces is None else ValStream(SampleRows(pieces, None, None, padding=self.padding), shape)

    def _count_padding(self, rows: "SampleRows", shape: BatchShape) -> None:
        """Keep and print how much of the first micro-batches is padding."""
        places, padding = rows.padded(shape.micro_batch_size)
        self.padded = {"places": places, "padding": padding, "group_by_length": self.group_by_length}
        print(f"padding: {padding / places:.1%} of {places:,} places", file=sys.stderr)

    def _packed(self, pieces: "SampleTable", shape: BatchShape) -> list[np.ndarray] | None:
        if not self.packing.enabled:
            return None
        length = self.packing.length or shape.max_seq_length
        rows = pack_samples(pieces.lengths, length, self.packing.strategy)
        if shape.rank == 0:
            share = compute_fill_ratio(pieces.lengths, rows, length)
            each = len(pieces.lengths) / len(rows)
            print(
                f"packed {len(pieces.lengths):,} samples in {len(rows):,} rows of {length:,} tokens: {share:.1%} full, "
                f"{each:.1f} samples a row",
                file=sys.stderr,
            )
        return rows

    def _pieces(self, shape: BatchShape, part: Literal["train", "val"]) -> "SampleTable | None":
        """The samples for training or validation, none longer than the model reads."""
        from litgpt.data.stream.samples import SampleTable

        assert self.made is not None, "setup comes first"
        files = [(entry, file) for entry, file in self.made if entry.part in ("both", part)]
        split = [self._split(entry, file.count) for entry, file in files]
        parts = [held if part == "val" else trained for trained, held in split]
        if part == "train":
            counts = self.sizes_of(files, [len(numbers) for numbers in parts])
            seeds = [self._seed_of(entry) for entry, _ in files]
            parts = [taken(*one) for one in zip(parts, counts, seeds, strict=True)]
            if shape.rank == 0:
                _print_mix([entry for entry, _ in files], parts, [len(trained) for trained, _ in split])
        chosen = [np.column_stack([np.full(len(numbers), place), numbers]) for place, numbers in enumerate(parts)]
        if not sum(map(len, chosen)):
            if part == "train":
                raise UserError("data: no row is left to train on; lower val_fraction, or give more rows")
            return None
        pieces = SampleTable(
            [file for _, file in files], np.concatenate(chosen), shape.max_seq_length, self.on_overlong
        )
        names = [entry.rows.name for entry, _ in files]
        self.cut[part] = dict(
            zip(names, zip(pieces.overlong.tolist(), pieces.untrained.tolist(), strict=True), strict=True)
        )
        if shape.rank == 0 and (pieces.overlong.any() or pieces.left_out):
            print(
                f"{part}: {pieces.overlong.sum():,} samples are longer than {shape.max_seq_length:,} tokens "
                f"({self.on_overlong}); {pieces.left_out:,} left out",
                file=sys.stderr,
            )
        return pieces

    def _split(self, entry: DatasetEntry, count: int) -> tuple[np.ndarray, np.ndarray]:
        """The numbers of a set's samples for training and for validation."""
        if entry.part != "both":
            whole, none = np.arange(count), np.zeros(0, np.int64)
            return (whole, none) if entry.part == "train" else (none, whole)
        fraction = entry.source.val_fraction
        fraction = self.default_fraction() if fraction is None else fraction
        held = min(max(int(count * fraction), 1), count - 1) if fraction > 0 else 0
        kept = np.ones(count, bool)
        kept[list(map(FeistelPermutation(count, self._seed_of(entry), 0), range(held)))] = False
        return np.flatnonzero(kept), np.flatnonzero(~kept)

    def _seed_of(self, entry: DatasetEntry) -> int:
        """A seed of a set's own, so that other sets do not change what is drawn from it."""
        name = f"{self.seed}:{entry.rows.name}"
        return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


def iter_conversations(rows: "RowSet") -> Iterator[Conversation]:
    """The conversations in rows, without those that are none."""
    for _, row in rows.read():
        try:
            if not isinstance(row, BadRow):
                yield from rows.convert(row)
        except BadRow:
            continue  # counted when the rows are made samples


def wanted(source: DataSource, count: int) -> int:
    """How many samples of `count` an epoch has: a number, or a share where it is a fraction up to 1.0."""
    if source.sample is None:
        return count
    share = isinstance(source.sample, float) and source.sample <= 1
    return round(count * source.sample) if share else int(source.sample)


def taken(numbers: np.ndarray, wanted: int, seed: int) -> np.ndarray:
    """So many of some numbers: every one as often as it takes, and the rest in an order fixed by the seed."""
    if wanted == len(numbers) or not len(numbers):
        return numbers
    whole, rest = divmod(wanted, len(numbers))
    order = FeistelPermutation(len(numbers), seed, 1)
    drawn = np.fromiter((numbers[order(place)] for place in range(rest)), np.int64, rest)
    return np.sort(np.concatenate([np.tile(numbers, whole), drawn]))


def _print_mix(sets: list[DatasetEntry], parts: list[np.ndarray], there: list[int]) -> None:
    """Print the share that each of several sets has of an epoch, and how often its rows are in it."""
    total = sum(map(len, parts))
    for entry, part, count in zip(sets, parts, there, strict=True) if len(sets) > 1 else ():
        print(
            f"{entry.rows.name}: {len(part):,} samples, {len(part) / max(total, 1):.1%} of an epoch, "
            f"{len(part) / max(count, 1):.2f} times each",
            file=sys.stderr,
        )
