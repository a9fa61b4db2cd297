"""Generate the texts of all prompts in a file."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from litgpt.data.read.fields import BadRow
from litgpt.data.read.media import MEDIA_KINDS
from litgpt.data.read.row_media import MediaSources, list_media_sources
from litgpt.data.read.row_sources import read_rows
from litgpt.data.tokenizer import Tokenizer
from litgpt.errors import UserError
from litgpt.files import read_utf8
from litgpt.infer.engine import Engine
from litgpt.infer.generate import TextStream
from litgpt.infer.prompt_images import Prompt
from litgpt.infer.prompts import PromptEncoder
from litgpt.infer.requests import GeneratedToken, Request
from litgpt.infer.sequences import Sequence as EngineSequence

READ_SUFFIXES = (".txt", ".jsonl")


@dataclass(frozen=True)
class PromptRow:
    """A row of a file of prompts.

    Attributes:
        location: file and line.
        key: `prompt` or `messages`.
        value: a text, or the messages of a chat.
        sources: of the row's media, by kind.
        folder: the folder of the file, which paths of media are relative to and may not leave.
    """

    location: str
    key: str
    value: Any
    sources: MediaSources = field(default_factory=dict)
    folder: Path | None = None

    @property
    def values(self) -> dict[str, Any]:
        """The fields of the row that were read."""
        return {self.key: self.value, **{MEDIA_KINDS[kind].columns[0]: values for kind, values in self.sources.items()}}

    def encode(self, encoder: PromptEncoder, sys_prompt: str | None, chat_template: bool | None) -> Prompt:
        """Encode the prompt.

        Raises:
            UserError: naming the location, if the model has no format for it, or a medium cannot be read.
        """
        media: dict[str, Any] = {"sources": self.sources, "folder": self.folder}
        try:
            if self.key == "messages":
                if sys_prompt is not None:
                    raise UserError("sys_prompt: has no effect on messages; write it as the first of them")
                if chat_template is False:
                    raise UserError("chat_template: false has no effect on messages, which need it; set null")
                return encoder.encode_messages(self.value, **media)
            return encoder.encode(self.value, sys_prompt, chat_template, **media)
        except UserError as error:
            raise UserError(f"{self.location}: {error}") from None


def read_prompts(path: Path) -> list[PromptRow]:
    """The prompts of a file: the lines of a .txt that are not empty, or `prompt` or `messages` of the rows of a .jsonl.

    Raises:
        UserError: naming the line of the first row that has neither, or both.
    """
    if path.suffix not in READ_SUFFIXES:
        raise UserError(f"prompts: {path} is neither .txt nor .jsonl; use a file with one prompt a line")
    if path.suffix == ".txt":
        lines = enumerate(read_utf8(path).splitlines(), 1)
        rows = [PromptRow(f"{path}:{number}", "prompt", line) for number, line in lines if line.strip()]
    else:
        rows = [parse_prompt_row(location, row, path.parent) for location, row in read_rows(path)]
    if not rows:
        raise UserError(f"prompts: {path} has no prompts; use a file with at least one")
    return rows


def parse_prompt_row(location: str, row: Any, folder: Path) -> PromptRow:
    """The prompt of a row.

    Args:
        folder: of its file.

    Raises:
        UserError: naming the location, if the row has none.
    """
    if isinstance(row, BadRow):
        raise UserError(f"{location}: {row}; correct the line or remove it")
    keys = [key for key in ("prompt", "messages") if key in row] if isinstance(row, dict) else []
    if len(keys) != 1:
        raise UserError(f'{location}: has not exactly one of prompt and messages; write {{"prompt": "text"}}')
    value = row[keys[0]]
    is_valid = isinstance(value, str) if keys[0] == "prompt" else is_chat(value)
    if not is_valid:
        raise UserError(
            f"{location}: {keys[0]}: {json.dumps(value)[:60]} is not valid; write a text as prompt, and a list of "
            "objects with role and content as messages"
        )
    try:
        return PromptRow(location, keys[0], value, list_media_sources(row), folder)
    except BadRow as error:
        raise UserError(f"{location}: {error}") from None


def is_chat(value: Any) -> bool:
    """Whether a value is a list of messages, each with a role."""
    return bool(value) and isinstance(value, list) and all(isinstance(m, dict) and "role" in m for m in value)


@dataclass(frozen=True)
class WrittenText:
    """A text and its tokens, of which the last may belong to a stop string."""

    text: str
    tokens: Sequence[GeneratedToken]
    finish_reason: str

    @property
    def ids(self) -> list[int]:
        """The tokens without the stop token."""
        return [token.token for token in self.tokens if token.finish_reason != "stop"]


def generate_texts(
    engine: Engine,
    requests: Sequence[Callable[[], Request]],
    tokenizer: Tokenizer,
    stops: Sequence[str],
    *,
    continues: bool = False,
) -> Iterator[WrittenText]:
    """Yield the texts of requests in their order, as soon as all before them are complete.

    Args:
        requests: called when the engine is about to need one, since constraints take memory.
        stops: strings that end a text and are not part of it.
        continues: a text continues its prompt, so it may begin with a space; otherwise it is a separate text.

    Raises:
        UserError: if a request does not fit, or logits are not finite.
    """
    waiting, finished = iter(enumerate(requests)), dict[int, WrittenText]()
    running: dict[EngineSequence, tuple[int, TextStream, list[str]]] = {}
    following = next(waiting, None)
    for number in range(len(requests)):
        while number not in finished:
            while following is not None and engine.waiting < engine.max_sequences:
                sequence = engine.submit(following[1]())
                context = sequence.request.prompt if continues else ()
                running[sequence] = following[0], TextStream(tokenizer, context, stops), []
                following = next(waiting, None)
            for sequence, token in engine.step():
                if sequence not in running:  # it has ended at a stop string in this step
                    continue
                index, stream, pieces = running[sequence]
                pieces.append(stream.push(token))
                if stream.has_stop or token.finish_reason is not None:
                    reason = "stop" if stream.has_stop else str(token.finish_reason)
                    engine.cancel(sequence)
                    finished[index] = WrittenText("".join(pieces), sequence.tokens, reason)
                    del running[sequence]
            if error := next((sequence.error for sequence in running if sequence.error is not None), None):
                raise error
        yield finished.pop(number)
