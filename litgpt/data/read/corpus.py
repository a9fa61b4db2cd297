"""Text to be tokenized, with everything that its tokens depend on."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from litgpt.data.read.documents import BadRows, SkippedRows, Source
from litgpt.data.read.progress import FileWrapper


@dataclass(frozen=True)
class Corpus:
    """Text to be tokenized.

    Args:
        name: shown in messages.
        sources: what the text is read from; part of the cache key.
        documents: iterates over the documents from the start; gets a wrapper for files and a counter of skipped rows.
        bos: start every document with the bos token: True, False, or None for the tokenizer's default.
        eos: end every document with the eos token.
        bad_rows: stop at an invalid row, or skip and count it.
    """

    name: str
    sources: list[Source]
    documents: Callable[[FileWrapper, SkippedRows], Iterable[str]]
    bos: bool | None = None
    eos: bool = False
    bad_rows: BadRows = "stop"
