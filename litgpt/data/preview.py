"""Show what a run would read: counts, and samples of conversations with the trained tokens marked."""

import itertools
import random
from collections import Counter
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from litgpt.data.cache.examples import CachedExamples, RowReport
from litgpt.data.modules.finetuning import FinetuningData
from litgpt.data.render.labels import Example
from litgpt.data.stream.batches import BlendedWindows, TrainStream, ValStream, Windows
from litgpt.data.stream.samples import SampleRows
from litgpt.data.stream.streaming import StreamedRows
from litgpt.data.tokenizer import Tokenizer
from litgpt.recipe.data import BatchShape, DataModule, Stream

TRAINED = ("⟦", "⟧")
"""What stands around a run of tokens that are trained, since a file of the output has no colours."""


def render_tokens(example: Example, tokenizer: Tokenizer) -> Text:
    """A sample's text; runs of tokens that are trained stand in brackets, with their weight if it is not 1."""
    text = Text()
    for weight, run in itertools.groupby(zip(example.ids, example.weights, strict=True), key=lambda pair: pair[1]):
        part = decode_tokens([int(token) for token, _ in run], tokenizer)
        if weight == 0:
            text.append(part, style="dim")
        else:
            times = "" if weight == 1 else f"×{weight:g}"
            text.append(f"{TRAINED[0]}{part}{TRAINED[1]}{times}", style="bold green")
    return text


def decode_tokens(ids: list[int], tokenizer: Tokenizer) -> str:
    """The text of some tokens, special ones included where the tokenizer can tell."""
    if tokenizer.backend == "huggingface":
        return tokenizer.processor.decode(ids, skip_special_tokens=False)
    return tokenizer.decode(ids)


def open_data(data: DataModule, tokenizer: Tokenizer | None, length: int) -> tuple[Stream, Stream | None]:
    """The training and validation streams of a run with one process, one sample at a time."""
    data.connect(tokenizer, 1, length)
    data.prepare_data()
    data.setup()
    shape = BatchShape(micro_batch_size=1, global_batch_size=1, max_seq_length=length)
    return data.train_stream(shape), data.val_stream(shape)


def list_windows(stream: Stream | None) -> list[Windows]:
    """The texts that a stream reads, cut into windows; none if another library reads them."""
    rows: Any = stream.rows if isinstance(stream, TrainStream | ValStream) else None
    parts = [rows.first, rows.second] if isinstance(rows, BlendedWindows) else [rows]
    return [part for part in parts if isinstance(part, Windows)]


def print_counts(data: DataModule, train: Stream, val: Stream | None, length: int) -> None:
    """Print documents, tokens, windows and left-over tokens of each text, and where it lies; or sets of samples."""
    if isinstance(data, FinetuningData):
        print_sets(data)
        streams = [(name, stream) for name, stream in (("train", train), ("val", val)) if stream is not None]
        sizes = [(name, stream.samples_per_epoch) for name, stream in streams]
        counts = [f"{name}: " + ("read as needed" if size is None else f"{size:,} rows") for name, size in sizes]
        print(*counts, *dict.fromkeys(f"in {file.folder}" for _, file in data.made), sep="\n")
        return
    table = Table("split", "documents", "tokens", f"windows of {length:,}", "tail tokens", "skipped rows")
    folders = []
    for name, stream in (("train", train), ("val", val)):
        for windows in list_windows(stream):
            tokens: Any = windows.tokens
            numbers = [tokens.documents, tokens.total, windows.count, windows.tail]
            skipped = getattr(tokens, "about", {}).get("skipped", 0)
            table.add_row(name, *(f"{number:,}" for number in [*numbers, skipped]))
            folders.append(f"{name}: {tokens.folder}")
        if stream is not None and not list_windows(stream):
            samples = stream.samples_per_epoch
            table.add_row(name, "?", "?", "?" if samples is None else f"{samples:,}", "?", "?")
    Console().print(table)
    print(*folders, sep="\n")


def print_sets(data: FinetuningData) -> None:
    """Print of every set of rows how many were read and left out, and the samples and tokens that they became."""
    table = Table("rows of", "read", "left out", "samples", "tokens", "trained", "length: median", "99 %", "longest")
    reports: list[tuple[str, RowReport]] = []
    for entry, file in data.made:
        assert isinstance(file, CachedExamples)
        lengths = file.lengths()
        trained = int(file.targets().sum())
        middle, high = np.percentile(lengths, [50, 99]) if len(lengths) else (0, 0)
        numbers = [file.report.rows, file.report.left_out, file.count, file.tokens, trained]
        numbers += [int(middle), int(high), int(lengths.max(initial=0))]
        shown_numbers = [f"{number:,}" for number in numbers]
        if data.tokenize == "lazy":
            shown_numbers[3:] = ["?"] * 5
        table.add_row(entry.rows.name, *shown_numbers)
        reports.append((entry.rows.name, file.report))
    Console().print(table)
    print_reports(reports)


def print_reports(reports: list[tuple[str, RowReport]]) -> None:
    """Print how many rows of each set were left out, and the first of them."""
    for name, report in reports:
        if report.left_out:
            print(f"{name}: {report}", *(f"  {line}" for line in report.first), sep="\n")


def print_rows(rows: SampleRows | StreamedRows, tokenizer: Tokenizer, number: int, seed: int) -> None:
    """Print some rows, each with the samples in it; of streamed ones, some of those that come first."""
    table = Table(
        "row", "tokens", "trained", "lengths", f"text (trained: {TRAINED[0]}...{TRAINED[1]})", show_lines=True
    )
    chosen = rows.some(number, random.Random(seed))
    print_reports(
        [(name, RowReport(**one | {"reasons": Counter(one["reasons"])})) for name, one in rows.told().items()]
        if isinstance(rows, StreamedRows)
        else []
    )
    for index, examples in chosen:
        text = Text("\n──── next sample ────\n", style="bold yellow").join(
            render_tokens(one, tokenizer) for one in examples
        )
        lengths = [len(example.ids) for example in examples]
        trained = sum(int(np.count_nonzero(example.weights[1:])) for example in examples)
        channels = sorted({example.channel for example in examples if example.channel is not None})
        name = f"{index}" + (f" ({', '.join(channels)})" if channels else "")
        table.add_row(name, str(sum(lengths)), str(trained), ", ".join(map(str, lengths)), text)
    Console().print(table)
