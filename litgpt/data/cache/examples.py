"""Tokenized samples on disk: made once, mapped into memory, made again when anything they depend on changes.

A folder holds tokens.npy and weights.npy (of all samples, one after the other), offsets.npy (where each begins, and the
end), targets.npy (labels of each), channels.npy (number of its channel), examples.json (what they were made from, and a
report of the rows that were left out) and manifest.json. Its name is a hash of everything that the samples depend on.
"""

import hashlib
import itertools
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from litgpt.data.read.conversation import Conversation
from litgpt.data.read.documents import Source
from litgpt.data.read.fields import BadRow
from litgpt.data.read.row_sources import LocatedRow
from litgpt.data.render.labels import Example
from litgpt.errors import UserError
from litgpt.files import (
    DamagedFileError,
    lock_folder,
    read_json,
    remove_partial,
    staged_folder,
    write_json,
    write_manifest,
)

EXAMPLES_FORMAT = 1
ROWS_PER_BATCH = 512
"""Rows that are tokenized together, in parallel."""
MAX_SHOWN = 10
"""Rows that a report tells of in full."""
OnError = Literal["raise", "drop", "warn"]
Tokenize = Literal["ahead", "lazy"]


class Renderer(Protocol):
    """What makes samples of conversations."""

    def examples(self, conversations: Sequence[Conversation]) -> list[Example | BadRow]:
        """Each conversation as tokens, or what is wrong with it."""

    def question(self, conversation: Conversation) -> list[int]:
        """What the model reads before it gives the conversation's first answer; empty if that begins it."""

    def fingerprint_parts(self) -> list[Any]:
        """All that decides what becomes of a conversation, as JSON values."""

    @property
    def weighs(self) -> bool:
        """Whether it gives parts of an answer weights of their own."""


@dataclass
class RowReport:
    """Which rows were left out, and why.

    Attributes:
        rows: all that were read.
        reasons: how many were left out for each reason.
        first: where the first few stand, and what is wrong with them.
        overlong: samples longer than the model reads, whatever became of them.
        untrained: samples that were left out because nothing in them, or in what was left of them, is trained.
    """

    rows: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    first: list[str] = field(default_factory=list)
    overlong: int = 0
    untrained: int = 0

    @property
    def left_out(self) -> int:
        """How many rows were left out."""
        return self.reasons.total()

    def add(self, where: str, fault: BadRow) -> None:
        """Count a row that is left out."""
        self.reasons[fault.reason] += 1
        if len(self.first) < MAX_SHOWN:
            self.first.append(f"{where}: {fault}")

    def __str__(self) -> str:
        said = ", ".join(f"{count:,} {reason}" for reason, count in self.reasons.most_common())
        more = {"samples longer than the model reads": self.overlong, "samples with nothing to train": self.untrained}
        return "; ".join(
            [
                f"{self.left_out:,} of {self.rows:,} rows left out" + (f": {said}" if said else ""),
                *(f"{count:,} {what}" for what, count in more.items() if count),
            ]
        )


@dataclass(frozen=True)
class RowSet:
    """Rows to be made samples of.

    Attributes:
        name: what messages call them.
        sources: the files they are in.
        read: opens them from the start.
        convert: a row as conversations, most often one; raises BadRow.
        settings: what else decides what becomes of a row, as JSON values.
        channel: of rows that name none.
    """

    name: str
    sources: list[Source]
    read: Callable[[], Iterable[LocatedRow]]
    convert: Callable[[Any], list[Conversation]]
    settings: list[Any]
    channel: str | None = None


class CachedExamples:
    """The samples in a folder made by `prepare_examples`, mapped into memory when first read.

    Raises:
        DamagedFileError: if a file is missing or cut short.
    """

    sizes: tuple[str, ...] = ("tokens", "weights", "offsets", "targets", "channels")
    """The arrays in the folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.about: dict[str, Any] = read_json(folder / "examples.json")
        try:
            self.count, self.tokens = int(self.about["examples"]), int(self.about["tokens"])
            self.channels: list[str | None] = list(self.about["channels"])
            said = self.about["report"]
            self.report = RowReport(int(said["rows"]), Counter(said["reasons"]), list(said["first"]))
            self.weighted = bool(self.about["weighted"])
        except (KeyError, TypeError, ValueError):
            raise DamagedFileError(f"{folder / 'examples.json'}: does not describe samples; remove {folder}") from None
        sizes = {"tokens": self.tokens, "weights": self.tokens, "offsets": self.count + 1}
        sizes |= {"targets": self.count, "channels": self.count}
        for name in self.sizes:
            if len(self._open(name)) != sizes[name]:
                raise DamagedFileError(
                    f"{folder / name}.npy: not {sizes[name]} numbers; remove {folder} and it is made again"
                )
        self.fingerprint = folder.name
        self._maps: dict[str, np.ndarray] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}}  # a worker maps the files itself

    def _open(self, name: str) -> np.ndarray:
        path = self.folder / f"{name}.npy"
        try:
            return np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError):
            raise DamagedFileError(f"{path}: missing or damaged; remove {self.folder} and it is made again") from None

    def array(self, name: str) -> np.ndarray:
        """One of the arrays."""
        if name not in self._maps:
            self._maps[name] = self._open(name)
        return self._maps[name]

    def lengths(self) -> np.ndarray:
        """(count,) tokens of each sample."""
        return np.diff(self.array("offsets"))

    def targets(self) -> np.ndarray:
        """(count,) labels of each sample."""
        return self.array("targets")

    def read(self, number: int, start: int = 0, stop: int | None = None) -> Example:
        """Sample `number`, or tokens `start` .. `stop`-1 of it."""
        offsets = self.array("offsets")
        low, high = int(offsets[number]), int(offsets[number + 1])
        part = slice(low + start, high if stop is None else low + stop)
        channel = self.channels[int(self.array("channels")[number])]
        weights = self.array("weights")[part].astype(np.float32)
        return Example(self.array("tokens")[part].astype(np.int32), weights, channel)


def prepare_examples(
    rows: RowSet, renders: Renderer, cache: Path, on_error: OnError, tokenize: Tokenize = "ahead"
) -> CachedExamples:
    """The samples that rows become: those in `cache` if they are there, else made now.

    Two processes may ask at once; the second waits for the first.

    Args:
        on_error: at a row that is no conversation: stop, or leave it out and count it, or also name the first few.
        tokenize: now, or when samples are read.

    Raises:
        UserError: naming the first bad row, if they are to stop the run; if no row is left; or for a cache that cannot
            be written.
    """
    from litgpt.data.cache.lazy_examples import LazyExamples, build_lazy_examples

    build = _build_examples if tokenize == "ahead" else build_lazy_examples
    parts = [
        EXAMPLES_FORMAT,
        tokenize,
        [asdict(source) for source in rows.sources],
        rows.settings,
        renders.fingerprint_parts(),
    ]
    key = hashlib.sha256(json.dumps([*parts, rows.channel], default=str).encode()).hexdigest()[:20]
    folder = cache / key
    try:
        if not folder.is_dir():
            with lock_folder(cache):
                if not folder.is_dir():
                    remove_partial(cache)
                    with staged_folder(folder) as staged:
                        build(rows, renders, staged, on_error)
    except OSError as error:
        where = error.filename or cache
        raise UserError(f"data: {where}: {error.strerror or error}; mend that, or set data.cache_dir") from None
    made = CachedExamples(folder) if tokenize == "ahead" else LazyExamples(folder, renders, on_error)
    if made.report.left_out:
        if on_error == "raise":
            raise bad_row_error(made.report.first[0])
        shown = made.report.first if on_error == "warn" else []
        print(f"{rows.name}: {made.report}", *(f"  {line}" for line in shown), sep="\n", file=sys.stderr)
    if made.count == 0:
        first = made.report.first[0] if made.report.first else "there are none"
        raise UserError(f"data: {rows.name} holds no row to train on; the first fault: {first}")
    return made


def bad_row_error(fault: str) -> UserError:
    """The error that a bad row is where it stops the run."""
    return UserError(f"{fault}; mend it, or set data.on_error: drop")


def convert_rows(rows: RowSet, report: RowReport) -> Iterator[tuple[str, Conversation]]:
    """The conversations in rows, each with where it stands; the rows that are none are counted."""
    for where, row in rows.read():
        report.rows += 1
        try:
            if isinstance(row, BadRow):
                raise row
            yield from ((where, conversation) for conversation in rows.convert(row))
        except BadRow as fault:
            report.add(where, fault)


class _ExampleWriter:
    """The arrays of a folder while they grow; tokens and weights go to disk at once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = {name: (folder / f"{name}.raw").open("wb") for name in ("tokens", "weights")}
        self.lengths: list[int] = []
        self.targets: list[int] = []
        self.numbers: list[int] = []
        self.channels: dict[str | None, int] = {}
        self.weighted = False

    def add(self, example: Example, channel: str | None) -> None:
        self.files["tokens"].write(example.ids.astype("<i4").tobytes())
        self.files["weights"].write(example.weights.astype("<f4").tobytes())
        self.lengths.append(len(example.ids))
        self.targets.append(int(np.count_nonzero(example.weights[1:])))
        self.numbers.append(self.channels.setdefault(channel, len(self.channels)))
        self.weighted = self.weighted or bool(((example.weights != 0) & (example.weights != 1)).any())

    def finish(self) -> int:
        """Write them as .npy files; the number of tokens."""
        total = sum(self.lengths)
        types = {"tokens": ("<i4", "<i4"), "weights": ("<f4", "<f4" if self.weighted else "u1")}
        for name, (kind, kept) in types.items():
            self.files[name].close()
            raw = self.folder / f"{name}.raw"
            read = np.memmap(raw, dtype=kind, mode="r") if total else np.zeros(0, kind)
            np.save(self.folder / f"{name}.npy", read.astype(kept, copy=False), allow_pickle=False)
            raw.unlink()
        offsets = np.concatenate([[0], np.cumsum(self.lengths)]).astype(np.int64)
        arrays: dict[str, np.ndarray] = {"offsets": offsets, "targets": np.array(self.targets, np.int32)}
        for name, array in (arrays | {"channels": np.array(self.numbers, np.int32)}).items():
            np.save(self.folder / f"{name}.npy", array, allow_pickle=False)
        return total


def _build_examples(rows: RowSet, renders: Renderer, folder: Path, on_error: OnError) -> None:
    report, columns = RowReport(), _ExampleWriter(folder)
    found = convert_rows(rows, report)
    while group := list(itertools.islice(found, ROWS_PER_BATCH)):
        made = renders.examples([said for _, said in group])
        for (where, _), example in zip(group, made, strict=True):
            if isinstance(example, BadRow):
                report.add(where, example)
            else:
                columns.add(example, example.channel if example.channel is not None else rows.channel)
        if on_error == "raise" and report.first:
            raise bad_row_error(report.first[0])
    if on_error == "raise" and report.first:
        raise bad_row_error(report.first[0])
    total = columns.finish()
    counts = {"examples": len(columns.lengths), "tokens": total, "weighted": columns.weighted}
    write_description(folder, rows, report, counts | {"channels": list(columns.channels)})
    print(f"tokenized {rows.name}: {len(columns.lengths):,} samples, {total:,} tokens", file=sys.stderr)


def write_description(folder: Path, rows: RowSet, report: RowReport, counts: dict[str, Any]) -> None:
    """Write what samples were made from, and the hashes of all files."""
    about = {
        "format": EXAMPLES_FORMAT,
        "name": rows.name,
        "report": {"rows": report.rows, "reasons": dict(report.reasons), "first": report.first},
        "sources": [asdict(source) for source in rows.sources],
    }
    write_json(folder / "examples.json", about | counts)
    write_manifest(folder)
