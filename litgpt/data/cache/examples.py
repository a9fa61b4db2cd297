"""Tokenized samples on disk: built once, memory-mapped, and rebuilt when anything they depend on changes.

A folder holds tokens.npy and weights.npy (of all samples, concatenated), offsets.npy (start of each sample, and the
end), targets.npy (number of labels of each), channels.npy (channel number of each), for samples of two answers also
splits.npy (tokens of the first one) and values.npy (the number that belongs to both), for samples with images
media.jsonl (those of each sample that has some: file or bytes, tokens and sizes in patches) and media.npy (the byte at
which each sample starts, and the end), for samples with prompts without text nulls.npy (these, concatenated),
null_starts.npy (start of each, and the end) and prompts.npy (tokens that each stands for), examples.json (what they
were built from, with a report of the rows left out) and manifest.json. Its name is a hash of everything the samples
depend on.
"""

import itertools
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from litgpt.data.read.fields import BadRow
from litgpt.data.read.media import Medium
from litgpt.data.read.row_sets import OnError, RowReport, RowSet, bad_row_error
from litgpt.data.render.example import Example, PlacedMedium, Renderer, select_media
from litgpt.files import DamagedFileError, read_json, write_json, write_manifest
from litgpt.phases import phase

EXAMPLES_FORMAT = 2
ROWS_PER_BATCH = 512
"""Conversations that are tokenized in parallel."""


class CachedExamples:
    """The samples in a folder written by `build_examples`, memory-mapped on first use.

    Raises:
        DamagedFileError: if a file is missing or truncated.
    """

    array_names: tuple[str, ...] = ("tokens", "weights", "offsets", "targets", "channels")

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.metadata: dict[str, Any] = read_json(folder / "examples.json")
        try:
            self.count, self.tokens = int(self.metadata["examples"]), int(self.metadata["tokens"])
            self.channels: list[str | None] = list(self.metadata["channels"])
            self.report = RowReport.from_dict(self.metadata["report"])
            self.weighted = bool(self.metadata["weighted"])
            self.paired = bool(self.metadata.get("paired", False))
            self.has_media = bool(self.metadata.get("media", False))
            self.nulls = int(self.metadata.get("nulls", 0))
        except (KeyError, TypeError, ValueError):
            raise DamagedFileError(f"{folder / 'examples.json'}: does not describe samples; delete {folder}") from None
        sizes = {"tokens": self.tokens, "weights": self.tokens, "offsets": self.count + 1}
        sizes |= {"targets": self.count, "channels": self.count}
        if self.paired:
            self.array_names = (*self.array_names, "splits", "values")
            sizes |= {"splits": self.count, "values": self.count}
        if self.has_media:
            self.array_names, sizes["media"] = (*self.array_names, "media"), self.count + 1
        if self.nulls:
            self.array_names = (*self.array_names, "nulls", "null_starts", "prompts")
            sizes |= {"nulls": self.nulls, "null_starts": self.count + 1, "prompts": self.count}
        for name in self.array_names:
            if len(self._open(name)) != sizes[name]:
                raise DamagedFileError(
                    f"{folder / name}.npy: not {sizes[name]} numbers; delete {folder} to build it again"
                )
        self.fingerprint = folder.name
        self._arrays: dict[str, np.ndarray] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_arrays": {}}  # a worker maps the files itself

    def _open(self, name: str) -> np.ndarray:
        path = self.folder / f"{name}.npy"
        try:
            return np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError):
            raise DamagedFileError(f"{path}: missing or damaged; delete {self.folder} to build it again") from None

    def get_array(self, name: str) -> np.ndarray:
        """Return one of the arrays."""
        if name not in self._arrays:
            self._arrays[name] = self._open(name)
        return self._arrays[name]

    def lengths(self) -> np.ndarray:
        """(count,) tokens of each sample."""
        return np.diff(self.get_array("offsets"))

    def splits(self) -> np.ndarray:
        """(count,) tokens of the first of two answers; 0 for samples that are a single document."""
        return self.get_array("splits") if self.paired else np.zeros(self.count, np.int64)

    def targets(self) -> np.ndarray:
        """(count,) labels of each sample."""
        return self.get_array("targets")

    def read(self, number: int, start: int = 0, stop: int | None = None) -> Example:
        """Read sample `number`, or its tokens `start` .. `stop`-1."""
        offsets = self.get_array("offsets")
        low, high = int(offsets[number]), int(offsets[number + 1])
        part = slice(low + start, high if stop is None else low + stop)
        channel = self.channels[int(self.get_array("channels")[number])]
        weights = self.get_array("weights")[part].astype(np.float32)
        ids = self.get_array("tokens")[part].astype(np.int32)
        if not self.paired:
            media = select_media(self.read_media(number), start, high - low if stop is None else stop)
            example = Example(ids, weights, channel, media=media)
            return replace(example, **self._read_null_prompt(number)) if len(ids) == high - low else example
        split, value = int(self.get_array("splits")[number]), float(self.get_array("values")[number])
        return Example(ids, weights, channel, split, value, self.read_media(number))

    def _read_null_prompt(self, number: int) -> dict[str, Any]:
        """The prompt without text of a sample, as fields of it; empty if it has none."""
        if not self.nulls:
            return {}
        start, stop = self.get_array("null_starts")[number : number + 2].tolist()
        tokens = self.get_array("nulls")[start:stop].astype(np.int32)
        return {"null_prompt": tokens, "prompt_tokens": int(self.get_array("prompts")[number])} if len(tokens) else {}

    def read_media(self, number: int) -> tuple[PlacedMedium, ...]:
        """Read the images of a sample."""
        if not self.has_media:
            return ()
        start, stop = self.get_array("media")[number : number + 2].tolist()
        if start == stop:
            return ()
        with (self.folder / "media.jsonl").open("rb") as file:
            file.seek(start)
            return tuple(restore_media(values) for values in json.loads(file.read(stop - start)))


def restore_media(values: dict[str, Any]) -> PlacedMedium:
    """Build an image of a sample of the JSON values that `asdict` gave."""
    grids = tuple((steps, height, width) for steps, height, width in values["grids"])
    return PlacedMedium(**values | {"medium": Medium(**values["medium"]), "grids": grids})


class _ExampleWriter:
    """Collects the arrays of a folder; tokens, weights and images are written to disk at once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = {name: (folder / f"{name}.raw").open("wb") for name in ("tokens", "weights")}
        self.media = (folder / "media.jsonl").open("wb")
        self.media_ends = [0]
        self.lengths: list[int] = []
        self.targets: list[int] = []
        self.numbers: list[int] = []
        self.channels: dict[str | None, int] = {}
        self.splits: list[int] = []
        self.values: list[float] = []
        self.nulls: list[np.ndarray] = []
        self.prompts: list[int] = []
        self.weighted = False

    def add(self, example: Example, channel: str | None) -> None:
        self.files["tokens"].write(example.ids.astype("<i4").tobytes())
        self.files["weights"].write(example.weights.astype("<f4").tobytes())
        self.lengths.append(len(example.ids))
        self.targets.append(sum(int(np.count_nonzero(part.weights[1:])) for part in example.documents))
        self.splits.append(example.split)
        self.values.append(example.value)
        self.nulls.append(np.zeros(0, np.int32) if example.null_prompt is None else example.null_prompt)
        self.prompts.append(example.prompt_tokens)
        self.numbers.append(self.channels.setdefault(channel, len(self.channels)))
        self.weighted = self.weighted or example.is_weighted
        line = json.dumps([asdict(medium) for medium in example.media]).encode() + b"\n" if example.media else b""
        self.media_ends.append(self.media_ends[-1] + self.media.write(line))

    @property
    def has_media(self) -> bool:
        """Whether some samples have images."""
        return self.media_ends[-1] > 0

    @property
    def null_tokens(self) -> int:
        """Tokens of all prompts without text."""
        return sum(map(len, self.nulls))

    @property
    def paired(self) -> bool:
        """Whether the samples have two answers."""
        return any(self.splits)

    def finish(self) -> int:
        """Write the .npy files; returns the number of tokens."""
        total = sum(self.lengths)
        self.media.close()
        types = {"tokens": ("<i4", "<i4"), "weights": ("<f4", "<f4" if self.weighted else "u1")}
        for name, (raw_type, final_type) in types.items():
            self.files[name].close()
            raw = self.folder / f"{name}.raw"
            values = np.memmap(raw, dtype=raw_type, mode="r") if total else np.zeros(0, raw_type)
            np.save(self.folder / f"{name}.npy", values.astype(final_type, copy=False), allow_pickle=False)
            raw.unlink()
        offsets = np.concatenate([[0], np.cumsum(self.lengths)]).astype(np.int64)
        targets, channels = (np.array(numbers, np.int32) for numbers in (self.targets, self.numbers))
        arrays: dict[str, np.ndarray] = {"offsets": offsets, "targets": targets, "channels": channels}
        if self.paired:
            arrays |= {"splits": np.array(self.splits, np.int64), "values": np.array(self.values, np.float32)}
        if self.null_tokens:
            starts = np.concatenate([[0], np.cumsum([len(tokens) for tokens in self.nulls])])
            arrays |= {"nulls": np.concatenate(self.nulls), "null_starts": starts.astype(np.int64)}
            arrays["prompts"] = np.array(self.prompts, np.int32)
        if self.has_media:
            arrays["media"] = np.array(self.media_ends, np.int64)
        else:
            (self.folder / "media.jsonl").unlink()
        for name, array in arrays.items():
            np.save(self.folder / f"{name}.npy", array, allow_pickle=False)
        return total


def build_examples(rows: RowSet, renderer: Renderer, folder: Path, on_error: OnError) -> None:
    """Tokenize the rows into a folder.

    Raises:
        UserError: for an invalid row under `on_error: raise`.
    """
    report, writer = RowReport(), _ExampleWriter(folder)
    conversations = rows.read_conversations(report)
    with phase(f"tokenizing {rows.name}") as entry:
        while group := list(itertools.islice(conversations, ROWS_PER_BATCH)):
            entry.advance(len(group))
            examples = renderer.build_examples([conversation for _, conversation in group])
            for (location, conversation), example in zip(group, examples, strict=True):
                if isinstance(example, BadRow):
                    report.add(location, example)
                else:
                    report.unread.update({*conversation.unread, *renderer.list_unread(conversation)})
                    writer.add(example, example.channel if example.channel is not None else rows.channel)
            if on_error == "raise" and report.first:
                break
    if on_error == "raise" and report.first:
        raise bad_row_error(report.first[0])
    total = writer.finish()
    counts = {"examples": len(writer.lengths), "tokens": total, "weighted": writer.weighted, "paired": writer.paired}
    counts |= {"media": True} if writer.has_media else {}
    counts |= {"nulls": writer.null_tokens} if writer.null_tokens else {}
    write_metadata(folder, rows, report, counts | {"channels": list(writer.channels)})
    print(f"tokenized {rows.name}: {len(writer.lengths):,} samples, {total:,} tokens", file=sys.stderr)


def write_metadata(folder: Path, rows: RowSet, report: RowReport, counts: dict[str, Any]) -> None:
    """Write examples.json, which describes what the samples were built from, and the manifest."""
    metadata = {
        "format": EXAMPLES_FORMAT,
        "name": rows.name,
        "report": {
            "rows": report.rows,
            "reasons": dict(report.reasons),
            "first": report.first,
            "unread": dict(report.unread),
        },
        "sources": [asdict(source) for source in rows.sources],
    }
    write_json(folder / "examples.json", metadata | counts)
    write_manifest(folder)
