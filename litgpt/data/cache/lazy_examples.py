"""Conversations on disk that are tokenized when they are read, for sets that are too large to be tokenized ahead.

A folder holds conversations.jsonl, offsets.npy (the byte at which each line begins, and the end), examples.json and
manifest.json.
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from litgpt.data.cache.examples import (
    MAX_SHOWN,
    CachedExamples,
    OnError,
    Renderer,
    RowReport,
    RowSet,
    bad_row_error,
    convert_rows,
    write_description,
)
from litgpt.data.read.conversation import Conversation, Message
from litgpt.data.read.fields import BadRow, dump_json
from litgpt.data.render.labels import Example
from litgpt.errors import UserError
from litgpt.files import DamagedFileError


class LazyExamples(CachedExamples):
    """The conversations in a folder made by `build_lazy_examples`, as samples whose lengths are not known.

    One that cannot be made a sample when it is read stops the run, or stands as a sample that trains nothing; the
    first few are named.

    Raises:
        DamagedFileError: if a file is missing or cut short.
    """

    sizes = ("offsets",)

    def __init__(self, folder: Path, renders: Renderer, on_error: OnError) -> None:
        super().__init__(folder)
        self.renders, self.on_error = renders, on_error
        self._faults = 0
        end, size = int(self.array("offsets")[-1]), (folder / "conversations.jsonl").stat().st_size
        if end != size:
            raise DamagedFileError(f"{folder / 'conversations.jsonl'}: {size} bytes, not {end}; remove {folder}")

    def lengths(self) -> np.ndarray:
        """(count,) zeros: no length is known."""
        return np.zeros(self.count, np.int64)

    def targets(self) -> np.ndarray:
        """(count,) ones: each is taken to have something to train."""
        return np.ones(self.count, np.int32)

    def read(self, number: int, start: int = 0, stop: int | None = None) -> Example:
        """Sample `number`, whole."""
        offsets = self.array("offsets")
        with (self.folder / "conversations.jsonl").open("rb") as file:
            file.seek(int(offsets[number]))
            said = json.loads(file.read(int(offsets[number + 1] - offsets[number])))
        messages = tuple(Message(**message) for message in said.pop("messages"))
        (example,) = self.renders.examples([Conversation(messages, **said)])
        return self._nothing(number, example) if isinstance(example, BadRow) else example

    def _nothing(self, number: int, fault: BadRow) -> Example:
        said = f"{self.about['name']}: conversation {number + 1}: {fault}"
        if self.on_error == "raise":
            raise bad_row_error(said)
        self._faults += 1
        if self._faults <= MAX_SHOWN:
            print(f"{said}; trains nothing", file=sys.stderr)
        return Example(np.zeros(1, np.int32), np.zeros(1, np.float32), self.channels[0])


def build_lazy_examples(rows: RowSet, renders: Renderer, folder: Path, on_error: OnError) -> None:
    """Write the conversations of rows to a folder."""
    report, offsets, channels, weighted = RowReport(), [0], dict[str | None, None](), renders.weighs
    with (folder / "conversations.jsonl").open("wb") as file:
        for _, said in convert_rows(rows, report):
            if on_error == "raise" and report.first:
                break
            line = asdict(said) | {"channel": said.channel if said.channel is not None else rows.channel}
            weighted = weighted or any(one not in (0, 1) for one in (said.weight, *(m.weight for m in said.messages)))
            channels[line["channel"]] = None
            offsets.append(offsets[-1] + file.write(dump_json(line).encode() + b"\n"))
    if on_error == "raise" and report.first:
        raise bad_row_error(report.first[0])
    np.save(folder / "offsets.npy", np.array(offsets, np.int64), allow_pickle=False)
    counts: dict[str, Any] = {"examples": len(offsets) - 1, "tokens": 0, "weighted": weighted}
    write_description(folder, rows, report, counts | {"channels": list(channels) or [None]})


def check_lazy(packed: bool, on_overlong: str, group_by_length: int = 0) -> None:
    """Refuse what needs to know lengths ahead.

    Raises:
        UserError: naming the setting.
    """
    if packed:
        raise UserError("data.packing: true needs the lengths of all samples; set data.tokenize: ahead")
    if group_by_length:
        raise UserError(
            f"data.group_by_length: {group_by_length} needs the lengths of all samples; set data.tokenize: ahead"
        )
    if on_overlong in ("split", "raise"):
        raise UserError(f"data.on_overlong: {on_overlong} needs the lengths of all samples; set data.tokenize: ahead")
