"""Conversations on disk that are tokenized when they are read, for sets that are too large to tokenize ahead.

A folder holds conversations.jsonl, offsets.npy (the byte at which each line starts, and the end), examples.json and
manifest.json.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from litgpt.data.cache.examples import CachedExamples, write_metadata
from litgpt.data.read.conversation import Conversation
from litgpt.data.read.fields import BadRow, dump_json
from litgpt.data.read.media import Medium
from litgpt.data.read.message import Message
from litgpt.data.read.objects import Objects
from litgpt.data.read.preference import Preference, list_sides
from litgpt.data.read.row_sets import MAX_SHOWN, OnError, RowReport, RowSet, bad_row_error
from litgpt.data.render.example import Example, Renderer
from litgpt.files import DamagedFileError
from litgpt.messages import print_message


class LazyExamples(CachedExamples):
    """The conversations in a folder written by `build_lazy_examples`, as samples of unknown length.

    A conversation that cannot be rendered when it is read stops the run, or becomes a sample without trained tokens;
    the first few are printed.

    Raises:
        DamagedFileError: if a file is missing or truncated.
    """

    array_names = ("offsets",)

    def __init__(self, folder: Path, renderer: Renderer, on_error: OnError) -> None:
        super().__init__(folder)
        self.renderer, self.on_error = renderer, on_error
        self._error_count = 0
        end, size = int(self.get_array("offsets")[-1]), (folder / "conversations.jsonl").stat().st_size
        if end != size:
            raise DamagedFileError(f"{folder / 'conversations.jsonl'}: {size} bytes, not {end}; delete {folder}")

    def lengths(self) -> np.ndarray:
        """(count,) zeros, since lengths are unknown."""
        return np.zeros(self.count, np.int64)

    def targets(self) -> np.ndarray:
        """(count,) ones: each sample is assumed to have trained tokens."""
        return np.ones(self.count, np.int32)

    def read(self, number: int, _start: int = 0, _stop: int | None = None) -> Example:
        """Read sample `number`, always whole."""
        offsets = self.get_array("offsets")
        with (self.folder / "conversations.jsonl").open("rb") as file:
            file.seek(int(offsets[number]))
            values = json.loads(file.read(int(offsets[number + 1] - offsets[number])))
        (example,) = self.renderer.build_examples([restore_conversation(values)])
        return self._handle_error(number, example) if isinstance(example, BadRow) else example

    def _handle_error(self, number: int, error: BadRow) -> Example:
        message = f"{self.metadata['name']}: conversation {number + 1}: {error}"
        if self.on_error == "raise":
            raise bad_row_error(message)
        self._error_count += 1
        if self._error_count <= MAX_SHOWN:
            print_message(f"{message}; not trained")
        size = self.renderer.answers_per_sample
        return Example(np.zeros(size, np.int32), np.zeros(size, np.float32), self.channels[0], split=size - 1)


def restore_conversation(values: dict[str, Any]) -> Conversation:
    """Build a conversation, or a preference, of the JSON values that `asdict` gave."""
    objects = None if values.get("objects") is None else Objects.from_values(values["objects"])
    values = values | {"messages": tuple(map(restore_message, values["messages"])), "objects": objects}
    if "other" not in values:
        return Conversation(**values)
    return Preference(**values | {"other": restore_conversation(values["other"])})


def restore_message(values: dict[str, Any]) -> Message:
    """Build a message of the JSON values that `asdict` gave; older ones have no images."""
    return Message(**values | {"media": tuple(Medium(**medium) for medium in values.get("media", ()))})


def build_lazy_examples(rows: RowSet, renderer: Renderer, folder: Path, on_error: OnError) -> None:
    """Write the conversations of the rows into a folder.

    Raises:
        UserError: for an invalid row under `on_error: raise`.
    """
    report, offsets, channels, weighted = RowReport(), [0], dict[str | None, None](), renderer.has_weights
    with (folder / "conversations.jsonl").open("wb") as file:
        for _, conversation in rows.read_conversations(report):
            if on_error == "raise" and report.first:
                break
            channel = conversation.channel if conversation.channel is not None else rows.channel
            sides = list_sides(conversation)
            weights = [conversation.weight, *(message.weight for side in sides for message in side.messages)]
            weighted = weighted or any(weight not in (0, 1) for weight in weights)
            channels[channel] = None
            report.unread.update({*conversation.unread, *renderer.list_unread(conversation)})
            line = dump_json(asdict(conversation) | {"channel": channel, "unread": ()})
            offsets.append(offsets[-1] + file.write(line.encode() + b"\n"))
    if on_error == "raise" and report.first:
        raise bad_row_error(report.first[0])
    np.save(folder / "offsets.npy", np.array(offsets, np.int64), allow_pickle=False)
    counts: dict[str, Any] = {"examples": len(offsets) - 1, "tokens": 0, "weighted": weighted}
    write_metadata(folder, rows, report, counts | {"channels": list(channels) or [None]})
