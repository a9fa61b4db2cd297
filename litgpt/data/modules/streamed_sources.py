"""The sources of `Conversations` where their rows are read as they are needed."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from litgpt.data.cache.examples import RowSet
from litgpt.data.read.documents import Source
from litgpt.data.read.row_sources import DataSource, LocatedRow, list_files
from litgpt.data.stream.row_shards import (
    RowReader,
    RowShard,
    count_held_out,
    open_hub_shards,
    open_reader,
    read_held_out,
    take_all,
)
from litgpt.data.stream.streaming import SampleBuilder, StreamedBatches, StreamedRows, WeightedShard, fingerprint
from litgpt.errors import UserError
from litgpt.recipe.data import BatchShape

if TYPE_CHECKING:
    from litgpt.data.modules.conversations import Conversations

ENDS = 1 << 16
"""Bytes at both ends of a file by which it is known again: reading all of it would take as long as training."""

WINDOW = 2000
"""Rows that are shuffled together, unless told: enough to fill packed rows, tokenized in about a second."""


@dataclass(frozen=True)
class StreamedSource:
    """A source that is opened to be streamed.

    Attributes:
        source: what the recipe says of it.
        parts: its files, or its shards on the hub.
        held: how far its rows for validation reach into each part.
        known: by what it is known again.
    """

    source: DataSource
    parts: Sequence[RowReader]
    held: Sequence[int]
    known: list[Source]

    def rows(self) -> Iterator[LocatedRow]:
        """All rows, in the order of the files."""
        for part in self.parts:
            yield from (found for _, _, found in part(0, 0, take_all))

    def held_rows(self) -> Iterator[LocatedRow]:
        """The rows for validation."""
        return read_held_out(self.parts, self.held)


def open_source(source: DataSource, downloads: Path, val_rows: int) -> StreamedSource:
    """A source: files, or else a data set of the hub, which is not downloaded."""
    if Path(source.path).expanduser().exists():
        files = list_files(source, downloads)
        parts, known = [open_reader(file) for file in files], [fingerprint_ends(file) for file in files]
    else:
        parts = open_hub_shards(source)
        known = [Source(f"{source.path}/{source.split}", len(parts), "")]
    return StreamedSource(source, parts, count_held_out(parts, val_rows), known)


def fingerprint_ends(path: Path) -> Source:
    """The name, the size, and the SHA-256 of both ends of a file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        ends = file.read(ENDS)
        file.seek(max(0, size - ENDS))
        ends += file.read(ENDS)
    return Source(path.name, size, hashlib.sha256(ends).hexdigest())


def batches(
    data: "Conversations",
    streamed: Sequence[StreamedSource],
    rows_of: Callable[[DataSource, list[Source], Callable[[], Iterable[LocatedRow]]], RowSet],
    shape: BatchShape,
) -> StreamedBatches:
    """Endless micro batches of the sources' rows for one rank."""
    sets = [rows_of(one.source, one.known, one.rows) for one in streamed]
    making = SampleBuilder(
        renders=data.renders(),
        on_error=data.on_error,
        on_overlong=data.on_overlong,
        length=shape.max_seq_length,
        packing=(data.packing.length or shape.max_seq_length, data.packing.strategy) if data.packing.enabled else None,
        padding=data.padding,
        window=data.shuffle_buffer or WINDOW,
        seed=_seed(data.seed, shape.rank, shape.ranks),
    )
    names = sorted({one.source.channel or "default" for one in streamed})
    rows = StreamedRows(
        sets,
        mixed(streamed, data, shape),
        making,
        micro_batch_size=shape.micro_batch_size,
        channels=[] if names == ["default"] else names,
    )
    about = [[one.sources, one.settings, one.channel] for one in sets]
    weights = [one.source.weight for one in streamed]
    mark = fingerprint(about, weights, data.mix, data.val_rows, data.seed, shape.ranks, making.fingerprint_parts())
    return StreamedBatches(rows, shape, workers=data.num_workers, fingerprint=mark, also=data.report())


def mixed(streamed: Sequence[StreamedSource], data: "Conversations", shape: BatchShape) -> list[WeightedShard]:
    """One share of all files, or one of each source with its weight."""
    spread: dict[str, Any] = {"rank": shape.rank, "ranks": shape.ranks}
    if data.mix == "interleave":
        if not sum(one.source.weight for one in streamed):
            raise UserError("data.sources: weight: all are 0; give one that is more")
        return [
            WeightedShard(
                RowShard(one.source.path, one.parts, one.held, seed=_seed(data.seed, one.source.path), **spread),
                [number] * len(one.parts),
                one.source.weight,
            )
            for number, one in enumerate(streamed)
        ]
    parts = [part for one in streamed for part in one.parts]
    held = [last for one in streamed for last in one.held]
    owners = [number for number, one in enumerate(streamed) for _ in one.parts]
    name = ", ".join(one.source.path for one in streamed)
    return [WeightedShard(RowShard(name, parts, held, seed=data.seed, **spread), owners)]


def check_streaming(data: "Conversations", sources: Sequence[DataSource], val_sources: Sequence[DataSource]) -> None:
    """Refuse what cannot be done where the number of rows is not known.

    Raises:
        UserError: naming the setting, and another that would do.
    """
    ahead = {"tokenize": ("lazy", "ahead"), "stopping": ("all_exhausted", "first_exhausted")}
    for name, (refused, other) in ahead.items():
        if getattr(data, name) == refused:
            raise UserError(f"data.{name}: {refused} is not for data.streaming: true; set data.{name}: {other}")
    if data.group_by_length:
        raise UserError(f"data.group_by_length: {data.group_by_length} needs all lengths; set data.streaming: false")
    for fraction in [data.val_fraction, *(source.val_fraction for source in [*sources, *val_sources])]:
        if fraction:
            raise UserError(
                f"data.val_fraction: {fraction} needs the number of rows; with streaming set data.val_rows: 500, or "
                "val_sources"
            )
    if data.val_rows and val_sources:
        raise UserError(f"data.val_rows: {data.val_rows}, but there are val_sources; set data.val_rows: 0")
    for source in sources:
        if source.sample is not None:
            raise UserError(
                f"data.sources: sample: {source.sample} of {source.path} needs the number of rows; leave it out, or "
                "set weight, and data.mix: interleave"
            )


def _seed(*parts: Any) -> int:
    return int.from_bytes(hashlib.sha256(":".join(map(str, parts)).encode()).digest()[:8], "big")
