"""Base of the data modules of conversations and instructions: samples tokenized once, split, and batched in rows."""

import hashlib
import random
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from litgpt.data import stream
from litgpt.data.cache.examples import CachedExamples
from litgpt.data.cache.prepare_examples import prepare_examples
from litgpt.data.read.conversation import Conversation, iter_texts
from litgpt.data.read.documents import Source, fingerprint_files
from litgpt.data.read.fields import BadRow
from litgpt.data.read.row_sets import OnError, RowReport, RowSet
from litgpt.data.read.row_sources import DataSource, LocatedRow, read_rows
from litgpt.data.render.example import Renderer
from litgpt.data.stream.packing import OnOverlong, PackingStrategy, pack_samples
from litgpt.data.stream.sampler import FeistelPermutation, LengthGrouping
from litgpt.errors import UserError
from litgpt.messages import print_message
from litgpt.recipe.bounds import Count, Position, Seed, check_numbers
from litgpt.recipe.data import BatchShape, DataModule, Stream
from litgpt.recipe.effect import check_effects

if TYPE_CHECKING:
    from litgpt.data.stream.batch_media import MediaLoader
    from litgpt.data.stream.samples import SampleRows, SampleTable

Split = Literal["both", "train", "val"]


@dataclass(frozen=True)
class Packing:
    """Rows that hold as many samples as fit; attention is confined to each."""

    enabled: bool = False
    """Pack samples into rows; a row counts as one sample of the batch."""
    length: Count | None = None
    """Tokens per row; null for train.max_seq_length, or for twice that with samples of two answers."""
    strategy: PackingStrategy = "best_fit"
    """best_fit fills rows best; sequential keeps the order of the data."""

    def __post_init__(self) -> None:
        check_numbers(self, "data.packing.")
        other, cure = "data.packing.enabled: false", "set data.packing.enabled: true"
        names = ("length", "strategy")
        check_effects(self, "data.packing.", *names, have_effect=self.enabled, other=other, cure=cure)


@dataclass(frozen=True)
class DatasetEntry:
    """A set of rows of a run.

    Attributes:
        rows: the rows.
        source: how many of them are used.
        split: what they are used for; both holds some of them out for validation.
    """

    rows: RowSet
    source: DataSource
    split: Split = "both"


@dataclass(kw_only=True)
class FinetuningData(DataModule):
    """Base of the data modules of conversations: builds or finds the samples, splits them, and batches them in rows."""

    OTHER_NAMES: ClassVar = {"group_by_length": {"true": "50", "false": "0"}}
    """Values by their names in other projects."""

    output_key: ClassVar[str] = "data.cache_dir"

    seed: Seed = 42
    """Seed of the sample order and of the split for validation."""
    shuffle: bool = True
    """Read the samples in a new order in every epoch; false is the order of the sources and of their rows."""
    num_workers: Position = 4
    """Number of processes that prefetch; the batches do not depend on it."""
    on_error: OnError = "raise"
    """For invalid rows: raise; drop and count them; or warn, which also prints the first few."""
    on_overlong: OnOverlong = "truncate_right"
    """For samples longer than train.max_seq_length: drop, truncate_left, truncate_right, split or raise."""
    packing: Packing = field(default_factory=Packing)
    """Pack several samples into a row."""
    tokenize: Literal["ahead", "lazy"] = "ahead"
    """ahead tokenizes all samples once and keeps them on disk; lazy tokenizes each when it is read, for very large
    sets."""
    padding: bool = False
    """Stack samples, padded to the longest, instead of concatenating them."""
    group_by_length: Position = 0
    """Sort the samples of this many global batches by length together, so that those of a micro-batch have similar
    lengths; 0 disables it, 50 is usual."""

    # set during a run; untyped, because the types of settings are resolved and these need torch
    tokenizer: Any = field(default=None, init=False, repr=False)
    prepared: Any = field(default=None, init=False, repr=False)
    padding_report: Any = field(default=None, init=False, repr=False)
    cut_counts: Any = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        check_numbers(self, "data.")
        if self.group_by_length and self.packing.enabled:
            raise UserError(
                f"data.group_by_length: {self.group_by_length} has no effect on packed rows, which have equal length; "
                "set data.group_by_length: 0, or data.packing.enabled: false"
            )
        if not self.shuffle and (
            self.group_by_length or (self.packing.enabled and self.packing.strategy == "best_fit")
        ):
            cure = "data.group_by_length: 0" if self.group_by_length else "data.packing.strategy: sequential"
            raise UserError(f"data.shuffle: false needs {cure}, which keeps the order of samples; set it")
        if self.tokenize == "lazy":
            needs_lengths = {
                "data.packing: true": self.packing.enabled,
                f"data.group_by_length: {self.group_by_length}": self.group_by_length,
                f"data.on_overlong: {self.on_overlong}": self.on_overlong in ("split", "raise"),
            }
            for setting, is_set in needs_lengths.items():
                if is_set:
                    raise UserError(f"{setting} needs the lengths of all samples; set data.tokenize: ahead")

    def connect(self, tokenizer: Any = None, batch_size: int = 1, max_seq_length: int | None = None) -> None:  # noqa: ARG002
        """Set the tokenizer; batch size and sequence length are part of a stream's shape.

        Raises:
            UserError: if packed rows are longer than the sequence length.
        """
        self.tokenizer, length = tokenizer, self.packing.length
        longest = max_seq_length * self.answers_per_sample if max_seq_length else None
        if length and longest and length > longest:
            raise UserError(
                f"data.packing.length: {length} is longer than "
                f"{'twice ' if self.answers_per_sample == 2 else ''}train.max_seq_length: {max_seq_length}; "
                f"use at most {longest}"
            )

    def list_entries(self) -> list[DatasetEntry]:
        """List the rows that are read."""
        raise UserError(f"data: {type(self).__name__} has no rows")

    def build_renderer(self) -> Renderer:
        """Build the renderer of conversations."""
        raise UserError(f"data: {type(self).__name__} has no format for conversations")

    def build_media_loader(self) -> "MediaLoader | None":
        """Build what loads the images of micro-batches; None if samples have none."""
        return None

    def _row_options(self, _split: Literal["train", "val"]) -> dict[str, Any]:
        return {"value_name": self.value_name, "media": self.build_media_loader()}

    @property
    def value_name(self) -> str | None:
        """Name of the number that belongs to the answers of a sample; None for samples that are single documents."""
        return None

    def columns_read(self) -> Collection[str]:
        """Columns and fields that rows list as unread, although the objective of the run reads them."""
        return ()

    def cache_folder(self) -> Path:
        """The folder of the samples."""
        raise UserError(f"data: {type(self).__name__} has no folder for its samples")

    def list_outputs(self) -> dict[str, Path]:
        """The folder of the samples, by the key that sets it."""
        return {self.output_key: self.cache_folder()}

    def open_files(self, files: list[Path]) -> tuple[list[Source], Callable[[], Iterable[LocatedRow]]]:
        """Fingerprint some files; returns the fingerprints and a function that iterates over the rows."""
        self.cache_folder().mkdir(parents=True, exist_ok=True)
        sources = fingerprint_files(files, self.cache_folder() / "hashes.json")
        return sources, lambda: chain.from_iterable(map(read_rows, files))

    def default_val_fraction(self) -> float:
        """The fraction of rows for validation, where their source has none."""
        return 0.0

    def count_samples(self, sources: list[DataSource], sizes: list[int]) -> list[int]:  # noqa: ARG002
        """Number of samples per epoch from each training source, given that of each source alone."""
        return sizes

    def check_files(self, *, has_tokenizer: bool) -> None:
        """Check that there is a tokenizer for the rows."""
        if not has_tokenizer:
            raise UserError(
                f"tokenizer_dir: missing, but data: {type(self).__name__} is text; set it to the folder of a tokenizer"
            )

    def prepare_data(self) -> None:
        """Download and tokenize the rows, unless that was done before."""
        self.check_files(has_tokenizer=self.tokenizer is not None)
        renderer, folder = self.build_renderer(), self.cache_folder()
        self.prepared = [
            (entry, prepare_examples(entry.rows, renderer, folder, self.on_error, self.tokenize))
            for entry in self.list_entries()
        ]
        for _, file in self.prepared:
            file.report.remove_read(self.columns_read())

    def setup(self, *_args: Any, **_kwargs: Any) -> None:
        """Open the samples."""
        if self.prepared is None:
            self.prepare_data()

    def training_documents(self) -> Iterable[str]:
        """Iterate over the texts of the training rows, message by message."""
        for entry in self.list_entries():
            if entry.split != "val":
                yield from iter_texts(iter_conversations(entry.rows))

    def report(self) -> dict[str, Any]:
        """The counts of rows that were left out, by the name of their set, as JSON values."""
        reports: dict[str, Any] = {}
        for entry, file in self.prepared:
            name, report = entry.rows.name, file.report.to_dict()
            for number, key in enumerate(("overlong", "untrained")):
                report[key] = sum(counts[name][number] for counts in self.cut_counts.values() if name in counts)
            reports[name] = report
        return reports | ({"padding": self.padding_report} if self.padding_report else {})

    def encode_example_prompt(self, which: Literal["first", "random"] | int, seed: int) -> list[int]:
        """Tokens of the prompt of one conversation's first answer."""
        index = self.pick_conversation(which, seed)
        conversation = next(islice(self.iter_conversations(), index, None), None)
        try:
            return [] if conversation is None else self.build_renderer().encode_prompt(conversation)
        except BadRow:
            return []  # it was left out and counted

    def iter_conversations(self) -> Iterator[Conversation]:
        """Iterate over all conversations that are valid."""
        return chain.from_iterable(iter_conversations(entry.rows) for entry in self.list_entries())

    def pick_conversation(self, which: Literal["first", "random"] | int, seed: int) -> int:
        """Return the index of the first conversation, of a random one, or the given one.

        Raises:
            UserError: if the index is out of range.
        """
        count = sum(file.count for _, file in self.prepared)
        index = {"first": 0, "random": random.Random(seed).randrange(count)}.get(str(which), which)
        if not 0 <= int(index) < count:
            raise UserError(f"eval.evaluate_example: {which} of {count} conversations; use 0 to {count - 1}")
        return int(index)

    def print_row_reports(self, shape: BatchShape) -> None:
        """Print, on the first rank, the rows that were left out, and the columns and fields that nothing reads."""
        for entry, file in self.prepared if shape.rank == 0 else ():
            if file.report.left_out:
                shown = file.report.first if self.on_error == "warn" else []
                print_message(f"{entry.rows.name}: {file.report}", *(f"  {line}" for line in shown))
            if unread := file.report.describe_unread():
                print_message(f"{entry.rows.name}: {unread}")

    def train_stream(self, shape: BatchShape) -> Stream:
        """Stream the training samples, endlessly."""
        self.print_row_reports(shape)
        samples = self._select_samples(shape, "train")
        assert samples is not None
        grouping = LengthGrouping(shape.global_batch_size, self.group_by_length) if self.group_by_length else None
        packed = self._pack(samples, shape) if self.packing.enabled else None
        seed, options = self.seed if self.shuffle else None, self._row_options("train")
        rows = stream.samples.SampleRows(samples, packed, seed, padding=self.padding, grouping=grouping, **options)
        if self.padding and self.tokenize == "ahead" and shape.rank == 0:
            self._count_padding(rows, shape)
        return stream.batches.TrainStream(rows, shape, workers=self.num_workers)

    def val_stream(self, shape: BatchShape) -> Stream | None:
        """Stream one pass over the validation samples; None without any."""
        samples = self._select_samples(shape, "val")
        if samples is None:
            return None
        rows = stream.samples.SampleRows(samples, None, None, padding=self.padding, **self._row_options("val"))
        return stream.batches.ValStream(rows, shape)

    def _count_padding(self, rows: "SampleRows", shape: BatchShape) -> None:
        """Store and print the fraction of padding in the first micro-batches."""
        total, padding = rows.count_padding(shape.micro_batch_size)
        self.padding_report = {"places": total, "padding": padding, "group_by_length": self.group_by_length}
        print_message(f"padding: {padding / total:.1%} of {total:,} tokens")

    def _pack(self, samples: "SampleTable", shape: BatchShape) -> list[np.ndarray]:
        length = self.packing.length or shape.max_seq_length * self.answers_per_sample
        rows = pack_samples(samples.lengths, length, self.packing.strategy)
        if shape.rank == 0:
            longer = samples.lengths[samples.lengths > length]  # each has a row of its own
            ratio = float(samples.lengths.sum()) / (len(rows) * length + float((longer - length).sum()))
            more = f"; {len(longer):,} samples are longer, and have rows of their own" if len(longer) else ""
            print_message(
                f"packed {len(samples.lengths):,} samples into {len(rows):,} rows of {length:,} tokens: "
                f"{ratio:.1%} full, {len(samples.lengths) / len(rows):.1f} samples per row{more}",
            )
        return rows

    def _select_samples(self, shape: BatchShape, split: Literal["train", "val"]) -> "SampleTable | None":
        """Select the samples for training or validation, none longer than the model's maximum length.

        Returns:
            None if no sample is left for validation.

        Raises:
            UserError: if no sample is left to train on.
        """
        assert self.prepared is not None, "setup comes first"
        pairs: list[tuple[DatasetEntry, CachedExamples]]
        pairs = [(entry, file) for entry, file in self.prepared if entry.split in ("both", split)]
        entries = [entry for entry, _ in pairs]
        split_parts = [self._split(entry, file.count) for entry, file in pairs]
        parts = [part[split] for part in split_parts]
        if split == "train":
            available = [len(numbers) for numbers in parts]
            # a source's `sample` counts the rows of both sets; if it is more than there are, those for training repeat
            wanted = [_count_wanted(entry.source, file.count) for entry, file in pairs]
            held_out = [len(part.get("val", ())) for part in split_parts]
            sizes = [max(total - rows, 0) for total, rows in zip(wanted, held_out, strict=True)]
            counts = self.count_samples([entry.source for entry in entries], sizes)
            seeds = [self._derive_seed(entry) for entry in entries]
            parts = [_draw_samples(*arguments) for arguments in zip(parts, counts, seeds, strict=True)]
            if shape.rank == 0:
                _print_mix(entries, parts, available)
        chosen = [np.column_stack([np.full(len(numbers), index), numbers]) for index, numbers in enumerate(parts)]
        if not sum(map(len, chosen)):
            if split == "train":
                raise UserError("data: no row is left to train on; reduce val_fraction, or add rows")
            return None
        files = [file for _, file in pairs]
        table = stream.samples.SampleTable(files, np.concatenate(chosen), shape.max_seq_length, self.on_overlong)
        counts_of_files = zip(table.overlong.tolist(), table.untrained.tolist(), strict=True)
        self.cut_counts[split] = dict(zip([entry.rows.name for entry in entries], counts_of_files, strict=True))
        if shape.rank == 0 and (table.overlong.any() or table.left_out):
            print_message(
                f"{split}: {table.overlong.sum():,} samples are longer than {shape.max_seq_length:,} tokens "
                f"({self.on_overlong}); {table.left_out:,} left out",
            )
        if table.none_left and split == "train":
            raise UserError(f"data: {table.none_left}")
        if table.none_left and shape.rank == 0:
            print_message(f"{split}: {table.none_left}; there is no validation")
        return None if table.none_left else table

    def _split(self, entry: DatasetEntry, count: int) -> dict[str, np.ndarray]:
        """Split the sample numbers of a set for training and validation, of as many as its source asks for."""
        wanted = min(_count_wanted(entry.source, count), count)
        numbers = _draw_samples(np.arange(count), wanted, self._derive_seed(entry))
        if entry.split != "both":
            return {entry.split: numbers}
        fraction = entry.source.val_fraction
        fraction = self.default_val_fraction() if fraction is None else fraction
        val_count = min(max(int(wanted * fraction), 1), max(wanted - 1, 0)) if fraction > 0 else 0
        is_train = np.ones(wanted, bool)
        is_train[list(map(FeistelPermutation(wanted, self._derive_seed(entry), 0), range(val_count)))] = False
        return {"train": numbers[is_train], "val": numbers[~is_train]}

    def _derive_seed(self, entry: DatasetEntry) -> int:
        """Derive a seed for a set, so that other sets do not change which of its samples are drawn."""
        name = f"{self.seed}:{entry.rows.name}"
        return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


def iter_conversations(rows: RowSet) -> Iterator[Conversation]:
    """Iterate over the valid conversations of some rows; the others are counted when the rows are tokenized."""
    return (conversation for _, conversation in rows.read_conversations(RowReport()))


def _count_wanted(source: DataSource, count: int) -> int:
    """Number of samples per epoch out of `count`: a number, or a fraction if `sample` is a float up to 1.0."""
    if source.sample is None:
        return count
    is_fraction = isinstance(source.sample, float) and source.sample <= 1
    return round(count * source.sample) if is_fraction else int(source.sample)


def _draw_samples(numbers: np.ndarray, wanted: int, seed: int) -> np.ndarray:
    """Draw `wanted` samples: all of them as often as they fit, and the rest in an order given by the seed."""
    if wanted == len(numbers) or not len(numbers):
        return numbers
    repeats, rest = divmod(wanted, len(numbers))
    order = FeistelPermutation(len(numbers), seed, 1)
    drawn = np.fromiter((numbers[order(index)] for index in range(rest)), np.int64, rest)
    return np.sort(np.concatenate([np.tile(numbers, repeats), drawn]))


def _print_mix(entries: list[DatasetEntry], parts: list[np.ndarray], available: list[int]) -> None:
    """Print the fraction of an epoch that comes from each of several sets, and how often its samples repeat."""
    total = sum(map(len, parts))
    for entry, part, count in zip(entries, parts, available, strict=True) if len(entries) > 1 else ():
        print_message(
            f"{entry.rows.name}: {len(part):,} samples, {len(part) / max(total, 1):.1%} of an epoch, "
            f"{len(part) / max(count, 1):.2f} times each",
        )
