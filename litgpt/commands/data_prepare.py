"""`litgpt data prepare`: download and tokenize a run's data ahead of it, and count it."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from litgpt.commands.samples import print_sets
from litgpt.data.examples import ExampleFile
from litgpt.data.instruct import Finetuning
from litgpt.data.stream import Mix, TrainStream, ValStream, Windows
from litgpt.data.tokenizer import Tokenizer
from litgpt.files import verify_manifest
from litgpt.recipe.data import BatchShape, DataModule, Stream
from litgpt.recipe.data_commands import DataPrepare


def open_data(data: DataModule, tokenizer: Tokenizer | None, length: int) -> tuple[Stream, Stream | None]:
    """The training and validation streams of a run with one process, one sample at a time."""
    data.connect(tokenizer, 1, length)
    data.prepare_data()
    data.setup()
    shape = BatchShape(micro_batch_size=1, global_batch_size=1, max_seq_length=length)
    return data.train_stream(shape), data.val_stream(shape)


def windows_of(stream: Stream | None) -> list[Windows]:
    """The texts that a stream reads, cut into windows; none if another library reads them."""
    rows: Any = stream.rows if isinstance(stream, TrainStream | ValStream) else None
    parts = [rows.first, rows.second] if isinstance(rows, Mix) else [rows]
    return [part for part in parts if isinstance(part, Windows)]


def example_files(data: DataModule) -> list[ExampleFile]:
    """The samples on disk that a module of conversations reads; none of another module."""
    return [file for _, file in data.made] if isinstance(data, Finetuning) else []


def print_counts(data: DataModule, train: Stream, val: Stream | None, length: int) -> None:
    """Print documents, tokens, windows and left-over tokens of each text, and where it lies; or sets of samples."""
    if isinstance(data, Finetuning):
        print_sets(data)
        streams = [(name, stream) for name, stream in (("train", train), ("val", val)) if stream is not None]
        sizes = [(name, stream.samples_per_epoch) for name, stream in streams]
        counts = [f"{name}: " + ("read as needed" if size is None else f"{size:,} rows") for name, size in sizes]
        print(*counts, *dict.fromkeys(f"in {file.folder}" for _, file in data.made), sep="\n")
        return
    table = Table("split", "documents", "tokens", f"windows of {length:,}", "tail tokens", "skipped rows")
    folders = []
    for name, stream in (("train", train), ("val", val)):
        for windows in windows_of(stream):
            tokens: Any = windows.tokens
            numbers = [tokens.documents, tokens.total, windows.count, windows.tail]
            skipped = getattr(tokens, "about", {}).get("skipped", 0)
            table.add_row(name, *(f"{number:,}" for number in [*numbers, skipped]))
            folders.append(f"{name}: {tokens.folder}")
        if stream is not None and not windows_of(stream):
            samples = stream.samples_per_epoch
            table.add_row(name, "?", "?", "?" if samples is None else f"{samples:,}", "?", "?")
    Console().print(table)
    print(*folders, sep="\n")


def run(recipe: DataPrepare) -> None:
    """Prepare the data, hold what is on disk against its hashes, and print the counts.

    Raises:
        UserError: if the data cannot be read, or token shards are damaged.
    """
    tokenizer = Tokenizer(recipe.tokenizer_dir) if recipe.tokenizer_dir else None
    train, val = open_data(recipe.data, tokenizer, recipe.max_seq_length)
    folders = [getattr(windows.tokens, "folder", Path()) for windows in [*windows_of(train), *windows_of(val)]]
    for folder in [*folders, *(file.folder for file in example_files(recipe.data))]:
        if (folder / "manifest.json").is_file():
            verify_manifest(folder)
    print_counts(recipe.data, train, val, recipe.max_seq_length)
