"""One rank's share of the rows of some files, pass after pass, from any place on."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from litgpt.data.read.documents import decompress_lines, number_lines
from litgpt.data.read.row_sources import DataSource, LocatedRow, parse_json, read_parquet_rows, read_rows
from litgpt.data.stream.sampler import FeistelPermutation
from litgpt.errors import UserError

RowFilter = Callable[[int], bool]
FileRow = tuple[int, int, LocatedRow]
"""A row's number in its file, from 1; the byte behind it, where the file can be entered there; and the row."""
RowReader = Callable[[int, int, RowFilter], Iterator[FileRow]]
"""Opens a file behind so many rows and bytes, and gives those of the rows after it whose numbers are wanted."""


class RowShard:
    """Every `ranks`-th row of some parts, the parts in another order in every pass.

    Args:
        name: what messages call it.
        parts: files, or shards of a data set on the hub.
        held: how many rows at the start of each part are for validation.
        seed: fixes the order of the parts.

    Attributes:
        place: whole passes, parts of this one, rows of the part that is being read and bytes of it that lie behind.
    """

    def __init__(
        self, name: str, parts: Sequence[RowReader], held: Sequence[int], *, seed: int, rank: int, ranks: int
    ) -> None:
        self.name, self.parts, self.held = name, parts, held
        self.seed, self.rank, self.ranks = seed, rank, ranks
        self.go_to([0, 0, 0, 0])

    def go_to(self, place: Sequence[int]) -> None:
        """Read on from a place."""
        self.place = list(place)
        self._rows = self._read()

    def __next__(self) -> tuple[int, LocatedRow]:
        """The number of the part, and the next row in it."""
        return next(self._rows)

    def _read(self) -> Iterator[tuple[int, LocatedRow]]:
        while True:
            passes, first, row, byte = self.place
            found, whole = 0, not (first or row)
            order = FeistelPermutation(len(self.parts), self.seed, passes)
            for at in range(first, len(self.parts)):
                part = order(at)
                for number, behind, one in self.parts[part](row, byte, self._mine):
                    self.place = [passes, at, number, behind]
                    if number > self.held[part]:
                        found += 1
                        yield part, one
                row = byte = 0
            if whole and not found:
                raise UserError(
                    f"data.sources: {self.name} holds no row to train on for process {self.rank + 1} of {self.ranks}; "
                    "give more rows, or set data.val_rows: 0"
                )
            self.place = [passes + 1, 0, 0, 0]

    def _mine(self, number: int) -> bool:
        return number % self.ranks == self.rank


def take_all(number: int) -> bool:
    """Whether a row is wanted where all are."""
    return True


def open_reader(path: Path) -> RowReader:
    """A file as a part; files of lines and of groups are entered without reading what lies before."""
    if ".jsonl" in path.suffixes[-2:]:
        return partial(_lines, path)
    return partial(_groups if path.suffix == ".parquet" else _rows, path)


def count_held_out(parts: Sequence[RowReader], rows: int) -> list[int]:
    """How far the first so many rows of some parts reach into each."""
    held = []
    for part in parts:
        numbers = [number for number, _, _ in islice(part(0, 0, take_all), rows)] if rows else []
        held.append(numbers[-1] if numbers else 0)
        rows -= len(numbers)
    return held


def read_held_out(parts: Sequence[RowReader], held: Sequence[int]) -> Iterator[LocatedRow]:
    """The rows that are held back."""
    for part, last in zip(parts, held, strict=True):
        for number, _, found in part(0, 0, take_all) if last else ():
            if number > last:
                break
            yield found


def open_hub_shards(source: DataSource) -> list[RowReader]:
    """The shards of a data set of the hub, which are fetched while they are read.

    Raises:
        UserError: if the library `datasets` is not installed, or the hub cannot be reached.
    """
    if source.path.count("/") != 1 or source.path.startswith((".", "/", "~")):
        raise UserError(f"data.sources: {source.path}: no such file or folder, nor a name on the hub such as org/name")
    try:
        from datasets import load_dataset
    except ImportError:
        raise UserError(
            f"data.sources: {source.path}: needs the package datasets; `pip install litgpt[data]`"
        ) from None
    try:
        found: Any = load_dataset(source.path, split=source.split or "train", streaming=True)
        shards = [found.shard(num_shards=found.num_shards, index=index) for index in range(found.num_shards)]
    except Exception as error:  # the library raises errors of several others
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            f"data.sources: {source.path}: no such file, and not to be had from the hub ({reason})"
        ) from None
    return [partial(_shard, shard, f"{source.path}/{number}") for number, shard in enumerate(shards)]


def _lines(path: Path, row: int, byte: int, mine: RowFilter) -> Iterator[FileRow]:
    """The lines of a file; one that is not packed is entered at a byte."""
    plain = path.suffix == ".jsonl"
    with _opened(path) as raw:
        raw.seek(byte if plain else 0)
        for number, line in number_lines(path, decompress_lines(path, raw)):
            number += row if plain else 0
            byte += len(line)
            if number > row and mine(number) and line.strip():
                yield number, byte if plain else 0, (f"{path}:{number}", parse_json(line))


def _groups(path: Path, row: int, byte: int, mine: RowFilter) -> Iterator[FileRow]:
    for number, found in read_parquet_rows(path, row, mine):
        yield number, 0, (f"{path}[{number - 1}]", found)


def _rows(path: Path, row: int, byte: int, mine: RowFilter) -> Iterator[FileRow]:
    """The rows of a file that can only be read from its start."""
    for number, found in enumerate(read_rows(path), 1):
        if number > row and mine(number):
            yield number, 0, found


def _shard(shard: Any, name: str, row: int, byte: int, mine: RowFilter) -> Iterator[FileRow]:
    try:
        for number, found in enumerate(shard.skip(row), row + 1):
            if mine(number):
                yield number, 0, (f"{name}[{number - 1}]", found)
    except Exception as error:  # of the hub, the network and the formats of files
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"data.sources: {name}: cannot be read on ({reason}); set resume: auto to go on") from None


def _opened(path: Path) -> Any:
    try:
        return path.open("rb")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}; mend that, or give another path") from None
