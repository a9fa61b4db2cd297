"""One rank's shard of the rows of some files, pass after pass, resumable at any row."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from litgpt.data.read.documents import convert_errors, decompress_lines, number_lines
from litgpt.data.read.row_sources import (
    DataSource,
    LocatedRow,
    check_hub_name,
    parse_json,
    raise_no_dataset,
    read_parquet_rows,
    read_rows,
)
from litgpt.data.stream.sampler import FeistelPermutation
from litgpt.errors import UserError

RowFilter = Callable[[int], bool]
FileRow = tuple[int, int, LocatedRow]
"""A row's number in its file, from 1; the byte after it, in files that can be read from there; and the row."""
RowReader = Callable[[int, int, RowFilter], Iterator[FileRow]]
"""Reads a file after a number of rows and bytes, and yields the rows whose numbers the filter accepts."""


@dataclass(eq=False)
class RowShard:
    """Every `ranks`-th row of some files, with the files in a new order every pass.

    Args:
        name: shown in messages.
        readers: read the files, or the shards of a data set on the hub.
        held_out: number of rows at the start of each file that are for validation.
        set_numbers: the number of the row set that each file belongs to.
        weight: sampling weight, relative to the other shards of the rank.
        seed: seed of the order of the files.

    Attributes:
        position: passes, files of the current pass, and rows and bytes of the current file read so far.
    """

    name: str
    readers: Sequence[RowReader]
    held_out: Sequence[int]
    set_numbers: Sequence[int]
    weight: float = 1.0
    seed: int = field(kw_only=True)
    rank: int = field(kw_only=True)
    ranks: int = field(kw_only=True)

    def __post_init__(self) -> None:
        self.seek([0, 0, 0, 0])

    def seek(self, position: Sequence[int]) -> None:
        """Continue reading at a position."""
        self.position = list(position)
        self._rows = self._read()

    def __next__(self) -> tuple[int, LocatedRow]:
        """The number of the row set of the next row, and the row."""
        return next(self._rows)

    def _read(self) -> Iterator[tuple[int, LocatedRow]]:
        while True:
            passes, first, row, byte = self.position
            count, is_full_pass = 0, not (first or row)
            order = FeistelPermutation(len(self.readers), self.seed, passes)
            for index in range(first, len(self.readers)):
                file = order(index)
                for number, end, located_row in self.readers[file](row, byte, self._is_wanted):
                    self.position = [passes, index, number, end]
                    if number > self.held_out[file]:
                        count += 1
                        yield self.set_numbers[file], located_row
                row = byte = 0
            if is_full_pass and not count:
                raise UserError(
                    f"data.sources: {self.name} has no row to train on for process {self.rank + 1} of {self.ranks}; "
                    "add rows, or set data.val_rows: 0"
                )
            self.position = [passes + 1, 0, 0, 0]

    def _is_wanted(self, number: int) -> bool:
        return number % self.ranks == self.rank


def take_all(_number: int) -> bool:
    """Accept every row."""
    return True


def open_reader(path: Path) -> RowReader:
    """Open a file; .jsonl and .parquet files are entered without reading what comes before."""
    if ".jsonl" in path.suffixes[-2:]:
        return partial(_read_jsonl_rows, path)
    return partial(_read_groups if path.suffix == ".parquet" else _read_all, path)


def count_held_out(readers: Sequence[RowReader], rows: int) -> list[int]:
    """Number of the last row in each file that belongs to the first `rows` rows of all."""
    held_out = []
    for reader in readers:
        numbers = [number for number, _, _ in islice(reader(0, 0, take_all), rows)] if rows else []
        held_out.append(numbers[-1] if numbers else 0)
        rows -= len(numbers)
    return held_out


def open_hub_shards(source: DataSource) -> list[RowReader]:
    """Open the shards of a data set on the hub, which are downloaded while they are read.

    Raises:
        UserError: if the package `datasets` is not installed, or the hub cannot be reached.
    """
    check_hub_name(source.path)
    try:
        from datasets import load_dataset
    except ImportError:
        raise UserError(f"data.sources: {source.path}: datasets is not installed: pip install 'litgpt[data]'") from None
    with raise_no_dataset(source.path):
        dataset: Any = load_dataset(source.path, split=source.split or "train", streaming=True)
        shards = [dataset.shard(num_shards=dataset.num_shards, index=index) for index in range(dataset.num_shards)]
    return [partial(_read_hub_shard, shard, f"{source.path}/{number}") for number, shard in enumerate(shards)]


def _read_jsonl_rows(path: Path, row: int, byte: int, is_wanted: RowFilter) -> Iterator[FileRow]:
    """Read the lines of a file; an uncompressed one is entered at a byte."""
    plain = path.suffix == ".jsonl"
    with _open(path) as raw:
        raw.seek(byte if plain else 0)
        for number, line in number_lines(path, decompress_lines(path, raw)):
            number += row if plain else 0
            byte += len(line)
            if number > row and is_wanted(number) and line.strip():
                yield number, byte if plain else 0, (f"{path}:{number}", parse_json(line))


def _read_groups(path: Path, row: int, _byte: int, is_wanted: RowFilter) -> Iterator[FileRow]:
    for number, values in read_parquet_rows(path, row, is_wanted):
        yield number, 0, (f"{path}[{number - 1}]", values)


def _read_all(path: Path, row: int, _byte: int, is_wanted: RowFilter) -> Iterator[FileRow]:
    """Read the rows of a file that can only be read from its start."""
    for number, located_row in enumerate(read_rows(path), 1):
        if number > row and is_wanted(number):
            yield number, 0, located_row


def _read_hub_shard(shard: Any, name: str, row: int, _byte: int, is_wanted: RowFilter) -> Iterator[FileRow]:
    def convert(error: Exception) -> UserError:
        reason = " ".join(str(error).split())[:160]
        return UserError(f"data.sources: {name}: reading failed ({reason}); run the command again")

    # errors of the hub, the network and the file formats
    for number, values in enumerate(convert_errors(shard.skip(row), Exception, convert), row + 1):
        if is_wanted(number):
            yield number, 0, (f"{name}[{number - 1}]", values)


def _open(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}; fix that, or use another path") from None
