"""Sources of rows that are read on demand, and the shards of them that each rank reads."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from litgpt.data.read.documents import Source
from litgpt.data.read.row_sources import DataSource, LocatedRow, list_files
from litgpt.data.stream import row_shards
from litgpt.errors import UserError
from litgpt.recipe.data import BatchShape

HASHED_BYTES = 1 << 16
"""Bytes at each end of a file that are hashed: hashing all of it would take as long as training."""
DEFAULT_WINDOW = 2000
"""Rows that are shuffled together by default: enough to fill packed rows, tokenized in about a second."""


@dataclass(frozen=True)
class StreamedSource:
    """A source that is opened for streaming.

    Attributes:
        source: its settings in the recipe.
        readers: read its files, or its shards on the hub.
        held_out: number of rows at the start of each file that are for validation.
        files: identify its contents in cache keys and fingerprints.
    """

    source: DataSource
    readers: Sequence[row_shards.RowReader]
    held_out: Sequence[int]
    files: list[Source]

    def read_rows(self) -> Iterator[LocatedRow]:
        """Read all rows, in the order of the files."""
        for reader in self.readers:
            yield from (row for _, _, row in reader(0, 0, row_shards.take_all))

    def read_held_out(self) -> Iterator[LocatedRow]:
        """Read the rows for validation."""
        for reader, last in zip(self.readers, self.held_out, strict=True):
            for number, _, row in reader(0, 0, row_shards.take_all) if last else ():
                if number > last:
                    break
                yield row


def open_source(source: DataSource, downloads: Path, val_rows: int) -> StreamedSource:
    """Open a source: files, or else a data set on the hub, which is not downloaded."""
    if Path(source.path).expanduser().exists():
        paths = list_files(source, downloads)
        readers, files = [row_shards.open_reader(path) for path in paths], [fingerprint_ends(path) for path in paths]
    else:
        readers = row_shards.open_hub_shards(source)
        files = [Source(f"{source.path}/{source.split}", len(readers), "")]
    return StreamedSource(source, readers, row_shards.count_held_out(readers, val_rows), files)


def fingerprint_ends(path: Path) -> Source:
    """Name, size, and the SHA-256 of both ends of a file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        ends = file.read(HASHED_BYTES)
        file.seek(max(0, size - HASHED_BYTES))
        ends += file.read(HASHED_BYTES)
    return Source(path.name, size, hashlib.sha256(ends).hexdigest())


def build_shards(
    sources: Sequence[StreamedSource], mix: Literal["concat", "interleave"], seed: int, shape: BatchShape
) -> list[row_shards.RowShard]:
    """Build one shard of all files under `concat`, or one of each source with its weight under `interleave`."""
    if mix == "interleave" and not sum(source.source.weight for source in sources):
        raise UserError("data.sources: weight: all are 0; set one that is not")
    groups = [list(enumerate(sources))] if mix == "concat" else [[item] for item in enumerate(sources)]
    shards = []
    for group in groups:
        name = ", ".join(source.source.path for _, source in group)
        shard = row_shards.RowShard(
            name,
            [reader for _, source in group for reader in source.readers],
            [last for _, source in group for last in source.held_out],
            [number for number, source in group for _ in source.readers],
            group[0][1].source.weight if mix == "interleave" else 1.0,
            seed=derive_seed(seed, name) if mix == "interleave" else seed,
            rank=shape.rank,
            ranks=shape.ranks,
        )
        shards.append(shard)
    return shards


def derive_seed(*parts: Any) -> int:
    """Derive a seed from some values."""
    return int.from_bytes(hashlib.sha256(":".join(map(str, parts)).encode()).digest()[:8], "big")
