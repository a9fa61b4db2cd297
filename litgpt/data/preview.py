"""Show what a run reads: counts, and samples of conversations with the trained tokens marked."""

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from litgpt.data.cache.examples import CachedExamples
from litgpt.data.modules.finetuning import FinetuningData
from litgpt.data.read.row_sets import RowReport
from litgpt.data.render.example import Example, PlacedMedium
from litgpt.data.stream.batch import ANSWER_TITLES
from litgpt.data.stream.batches import TrainStream, ValStream
from litgpt.data.stream.samples import SampleRows
from litgpt.data.stream.streaming import StreamedRows
from litgpt.data.stream.windows import BlendedWindows, Windows
from litgpt.data.tokenizer import Tokenizer
from litgpt.recipe.columns import format_columns
from litgpt.recipe.data import BatchShape, DataModule, Stream

TRAINED_MARKS = ("⟦", "⟧")
"""Surround trained tokens, since the output may be written to a file without colors."""


def list_runs(example: Example) -> Iterator[tuple[float, list[int], PlacedMedium | None]]:
    """The tokens of a sample in runs of one loss weight, and of one medium: the weight, the tokens and the medium.

    A sound track is not apart from its video, which is before it.
    """
    numbers = np.full(len(example.ids), -1)
    for number, placed in reversed(list(enumerate(example.media))):
        numbers[placed.start : placed.stop] = number
    tokens = zip(example.weights.tolist(), numbers.tolist(), example.ids.tolist(), strict=True)
    for (weight, number), run in itertools.groupby(tokens, key=lambda token: token[:2]):
        yield weight, [token for _, _, token in run], example.media[number] if number >= 0 else None


def mark_trained(example: Example, tokenizer: Tokenizer) -> Text:
    """Render the text of a sample; trained tokens are in brackets, with their loss weight if it is not 1.

    A medium is named in place of its tokens.
    """
    text = Text()
    for weight, ids, placed in list_runs(example):
        part = decode_tokens(ids, tokenizer) if placed is None else f"[{describe_medium(placed)}]"
        if weight == 0:
            text.append(part, style="dim" if placed is None else "cyan")
        else:
            text.append(f"{TRAINED_MARKS[0]}{part}{TRAINED_MARKS[1]}{format_weight(weight)}", style="bold green")
    return text


def format_weight(weight: float) -> str:
    """A factor of the loss, if it is not 1."""
    return "" if weight == 1 else f"×{weight:g}"


def describe_medium(placed: PlacedMedium) -> str:
    """The name of a medium, the patches of what the tower reads of it, and its tokens."""
    counts = Counter((height, width) for steps, height, width in placed.grids for _ in range(steps))
    sizes = [f"{number} of {height} x {width}" for (height, width), number in counts.items()]
    patches = f"{', '.join(sizes).removeprefix('1 of ')} patches, " if sizes and placed.medium.kind != "audio" else ""
    time = "" if placed.seconds is None else f"{sum(counts.values()) * placed.seconds:.1f} s, "
    track = "with its sound, " if placed.medium.has_track else ""
    return f"{placed.medium.kind} {Path(placed.medium.name).name}: {time}{patches}{track}{placed.tokens:,} tokens"


def decode_tokens(ids: list[int], tokenizer: Tokenizer) -> str:
    """Decode tokens, including special ones if the tokenizer supports that."""
    if tokenizer.backend == "huggingface":
        return tokenizer.processor.decode(ids, skip_special_tokens=False)
    return tokenizer.decode(ids)


def open_streams(data: DataModule, tokenizer: Tokenizer | None, length: int) -> tuple[Stream, Stream | None]:
    """Open the training and validation streams of one process with a batch size of 1."""
    data.connect(tokenizer, 1, length)
    data.prepare_data()
    data.setup()
    shape = BatchShape(micro_batch_size=1, global_batch_size=1, max_seq_length=length)
    return data.train_stream(shape), data.val_stream(shape)


def list_windows(stream: Stream | None) -> list[Windows]:
    """List the windows that a stream reads; empty if another library reads them."""
    samples: Any = stream.samples if isinstance(stream, TrainStream | ValStream) else None
    parts = [samples.first, samples.second] if isinstance(samples, BlendedWindows) else [samples]
    return [part for part in parts if isinstance(part, Windows)]


def print_counts(data: DataModule, train: Stream, val: Stream | None, length: int) -> None:
    """Print documents, tokens, windows, unused tokens and the folder of each text; or the sets of samples."""
    streams = [(name, stream) for name, stream in (("train", train), ("val", val)) if stream is not None]
    if isinstance(data, FinetuningData):
        print_row_sets(data)
        sizes = [(name, stream.samples_per_epoch) for name, stream in streams]
        counts = [f"{name}: " + ("read on demand" if size is None else f"{size:,} rows") for name, size in sizes]
        print(*counts, *dict.fromkeys(f"in {file.folder}" for _, file in data.prepared), sep="\n")
        return
    table = Table("split", "documents", "tokens", f"windows of {length:,}", "tail tokens", "skipped rows")
    folders = []
    for name, stream in streams:
        for windows in list_windows(stream):
            tokens: Any = windows.tokens
            numbers = [tokens.documents, tokens.total, windows.count, windows.tail]
            skipped = getattr(tokens, "metadata", {}).get("skipped", 0)
            table.add_row(name, *(f"{number:,}" for number in [*numbers, skipped]))
            folders.append(f"{name}: {tokens.folder}")
        if not list_windows(stream):
            samples = stream.samples_per_epoch
            table.add_row(name, "?", "?", "?" if samples is None else f"{samples:,}", "?", "?")
    Console().print(table)
    print(*folders, sep="\n")


def print_row_sets(data: FinetuningData) -> None:
    """Print the rows read and left out, the samples and the tokens of every set of rows."""
    reports: list[tuple[str, RowReport]] = []
    for entry, file in data.prepared:
        assert isinstance(file, CachedExamples)
        parts = [f"{file.report.rows:,} rows read, {file.report.left_out:,} left out"]
        if data.tokenize == "lazy":
            parts.append("tokenized when they are used")
        else:
            lengths, trained = file.lengths(), int(file.targets().sum())
            middle, high = np.percentile(lengths, [50, 99]).astype(int) if len(lengths) else (0, 0)
            parts.append(f"{file.count:,} samples with {file.tokens:,} tokens in all, {trained:,} trained")
            parts.append(f"lengths: median {middle:,}, 99 % {high:,}, longest {lengths.max(initial=0):,}")
        print(*format_columns([(f"{entry.rows.name}: ", "; ".join(parts))], indent=0, start=2), sep="\n")
        reports.append((entry.rows.name, file.report))
    print_reports(reports)


def print_reports(reports: list[tuple[str, RowReport]]) -> None:
    """Print the rows of each set that were left out, the first of them, and the columns that nothing reads."""
    for name, report in reports:
        if report.left_out:
            print(f"{name}: {report}", *(f"  {line}" for line in report.first), sep="\n")
        if unread := report.describe_unread():
            print(f"{name}: {unread}")


DrawnRow = tuple[int, list[Example]]
"""The index of a row, and its samples."""


def describe_row(index: int, examples: Sequence[Example]) -> tuple[str, list[int], int]:
    """The name of a row with its channels, the tokens of each document in it, and how many of all are trained."""
    documents = [document for example in examples for document in example.documents]
    channels = sorted({example.channel for example in examples if example.channel is not None})
    trained = sum(int(np.count_nonzero(document.weights[1:])) for document in documents)
    name = f"{index}" + (f" ({', '.join(channels)})" if channels else "")
    return name, [len(document.ids) for document in documents], trained


def print_rows(rows: SampleRows | StreamedRows, chosen: Sequence[DrawnRow], tokenizer: Tokenizer) -> None:
    """Print rows that were drawn, with their samples."""
    titles = ANSWER_TITLES.get(rows.value_name or "", ("text",))
    marks = f" (trained: {TRAINED_MARKS[0]}...{TRAINED_MARKS[1]})"
    table = Table("row", "tokens", "trained", "lengths", *(title + marks for title in titles), show_lines=True)
    if isinstance(rows, StreamedRows):
        print_reports([(row_set.name, report) for row_set, report in zip(rows.row_sets, rows.reports, strict=True)])
    for index, examples in chosen:
        separator = Text("\n──── next sample ────\n", style="bold yellow")
        sides = zip(*(example.documents for example in examples), strict=True)
        texts = [separator.join(mark_trained(document, tokenizer) for document in side) for side in sides]
        name, lengths, trained = describe_row(index, examples)
        table.add_row(name, str(sum(lengths)), str(trained), ", ".join(map(str, lengths)), *texts)
    Console().print(table)
