"""Text as tokens on disk: made once, mapped into memory, made again when the text or the tokenizer changes.

A folder holds tokens.bin (uint16 or uint32, little-endian, all documents one after the other), documents.bin (int64,
the token at which each document begins), tokens.json (what they were made from) and manifest.json (size and SHA-256 of
each file). Its name is a hash of everything that the tokens depend on.
"""

import hashlib
import json
import sys
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from litgpt.data.read.documents import BadRows, SkippedRows, Source
from litgpt.data.read.progress import FileWrapper, progress_bar
from litgpt.data.tokenizer import Tokenizer
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

TOKENS_FORMAT = 1
BATCH_CHARACTERS = 1_000_000
PIECE_CHARACTERS = 100_000


@dataclass(frozen=True)
class Corpus:
    """Text to be tokenized.

    Args:
        name: what progress calls it.
        sources: what it is made from.
        documents: opens it from the start; gets what wraps its files, the policy for bad rows, and what counts them.
        bos: begin every document with this token: True, False, or None as the tokenizer says.
        eos: end every document with this token.
        bad_rows: stop at a bad row, or skip and count it.
    """

    name: str
    sources: list[Source]
    documents: Callable[[FileWrapper, SkippedRows], Iterable[str]]
    bos: bool | None = None
    eos: bool = False
    bad_rows: BadRows = "stop"

    def key(self, tokenizer: Tokenizer) -> str:
        """A hash of everything that the tokens depend on."""
        sources = [asdict(source) for source in self.sources]
        parts = [TOKENS_FORMAT, sources, tokenizer.fingerprint(), self.bos, self.eos, self.bad_rows]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:20]


class TokenFile:
    """The tokens in a folder made by `prepare_tokens`, mapped into memory when first read.

    Raises:
        DamagedFileError: if a file is missing or cut short.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.about: dict[str, Any] = read_json(folder / "tokens.json")
        try:
            self.total, self.documents = int(self.about["tokens"]), int(self.about["documents"])
            self._dtype = np.dtype({"uint16": "<u2", "uint32": "<u4"}[self.about["dtype"]])
        except (KeyError, TypeError, ValueError):
            raise DamagedFileError(f"{folder / 'tokens.json'}: does not describe tokens; remove {folder}") from None
        self.fingerprint = folder.name
        for name, size in (("tokens.bin", self.total * self._dtype.itemsize), ("documents.bin", self.documents * 8)):
            if not (folder / name).is_file() or (folder / name).stat().st_size != size:
                raise DamagedFileError(
                    f"{folder / name}: missing or not {size} bytes; remove {folder} and it is made again"
                )
        self._tokens: np.ndarray | None = None
        self._starts: np.ndarray | None = None

    def __getstate__(self) -> dict[str, Any]:
        # a worker maps the files itself: a pickled map would be a copy of all the text
        return {**self.__dict__, "_tokens": None, "_starts": None}

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens start .. stop-1."""
        if self._tokens is None:
            self._tokens = np.memmap(self.folder / "tokens.bin", dtype=self._dtype, mode="r")
        return self._tokens[start:stop]

    def find_document_starts(self, start: int, stop: int) -> np.ndarray:
        """Where documents begin, of those that begin in start .. stop-1."""
        if self._starts is None:
            self._starts = np.memmap(self.folder / "documents.bin", dtype="<i8", mode="r")
        low, high = np.searchsorted(self._starts, [start, stop])
        return np.array(self._starts[low:high])


def prepare_tokens(corpus: Corpus, tokenizer: Tokenizer, cache: Path) -> TokenFile:
    """The tokens of a corpus: those in `cache` if they are there, else made now.

    Two processes may ask at once; the second waits for the first. What a process that died left behind is removed.

    Raises:
        UserError: for text that cannot be read, or a cache that cannot be written.
    """
    folder = cache / corpus.key(tokenizer)
    if folder.is_dir():
        return TokenFile(folder)
    try:
        with lock_folder(cache):
            if not folder.is_dir():
                remove_partial(cache)
                with staged_folder(folder) as staged:
                    _build_tokens(corpus, tokenizer, staged)
    except OSError as error:
        where = error.filename or cache
        raise UserError(f"data: {where}: {error.strerror or error}; mend that, or set data.cache_dir") from None
    return TokenFile(folder)


def _build_tokens(corpus: Corpus, tokenizer: Tokenizer, folder: Path) -> None:
    dtype = np.dtype("<u2" if tokenizer.id_limit <= 65536 else "<u4")
    skipped, starts, total, digest = SkippedRows(), array("q"), 0, hashlib.sha256()
    size = sum(source.bytes for source in corpus.sources)
    with progress_bar(f"tokenizing {corpus.name}", size) as wrap_file, (folder / "tokens.bin").open("wb") as file:
        for batch in _group_texts(corpus.documents(wrap_file, skipped)):
            for tokens in encode_documents(tokenizer, batch):
                framed = tokenizer.frame(tokens, bos=corpus.bos, eos=corpus.eos).astype(dtype).tobytes()
                starts.append(total)
                total += len(framed) // dtype.itemsize
                digest.update(framed)
                file.write(framed)
    if total == 0:
        raise UserError(f"data: {corpus.name} holds no tokens; the first fault: {skipped.first or 'no documents'}")
    np.array(starts, dtype="<i8").tofile(folder / "documents.bin")
    write_json(
        folder / "tokens.json",
        {
            "format": TOKENS_FORMAT,
            "name": corpus.name,
            "dtype": "uint16" if dtype.itemsize == 2 else "uint32",
            "tokens": total,
            "documents": len(starts),
            "skipped": skipped.count,
            "first_skipped": skipped.first,
            "tokenizer": tokenizer.fingerprint(),
            "sources": [asdict(source) for source in corpus.sources],
        },
    )
    write_manifest(folder, known={"tokens.bin": digest.hexdigest()})
    left_out = f", {skipped.count:,} rows skipped (first: {skipped.first})" if skipped.count else ""
    print(f"tokenized {corpus.name}: {len(starts):,} documents, {total:,} tokens{left_out}", file=sys.stderr)


def _group_texts(documents: Iterable[str], characters: int = BATCH_CHARACTERS) -> Iterator[list[str]]:
    """Texts in groups of about so many characters, which bounds the memory that encoding takes."""
    batch: list[str] = []
    size = 0
    for text in documents:
        batch.append(text)
        size += len(text)
        if size >= characters:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def encode_documents(tokenizer: Tokenizer, texts: list[str]) -> list[np.ndarray]:
    """The tokens of each text, in parallel; long texts are cut where that cannot change their tokens."""
    cut = [split_text(tokenizer, text) for text in texts]
    encoded: list[np.ndarray] = []
    for batch in _group_texts(piece for parts in cut for piece in parts):
        encoded += tokenizer.encode_batch(batch)
    parts_of = iter(encoded)
    return [np.concatenate([next(parts_of) for _ in parts]) for parts in cut]


def split_text(tokenizer: Tokenizer, text: str, size: int = PIECE_CHARACTERS) -> list[str]:
    """A text in pieces of at least `size` characters whose tokens, put together, are those of the whole.

    Cuts lie between a line end and a character that is no space, and only where 500 characters on either side give
    the same tokens apart as together. A tokenizer that does not split words before merging, or that marks the start
    of every text, fails that test everywhere, and its texts stay whole.
    """
    if tokenizer.backend != "huggingface" or tokenizer.processor.pre_tokenizer is None:
        return [text]
    cuts, start = [0], 0
    while start + 2 * size < len(text):
        cut = next((at for at in _line_starts(text, start + size) if _is_safe(tokenizer, text, at)), None)
        if cut is not None:
            cuts.append(cut)
        start = cut or start + size
    return [text[begin:end] for begin, end in zip(cuts, [*cuts[1:], len(text)], strict=True)]


def _line_starts(text: str, start: int, tries: int = 8) -> Iterator[int]:
    """A few places at or after `start` where a line begins with something other than space."""
    for _ in range(tries):
        start = text.find("\n", start) + 1
        if start == 0 or start >= len(text):
            return
        if not text[start].isspace():
            yield start


def _is_safe(tokenizer: Tokenizer, text: str, at: int) -> bool:
    before, behind = text[max(0, at - 500) : at], text[at : at + 500]
    whole, left, right = tokenizer.encode_batch([before + behind, before, behind])
    return np.array_equal(whole, np.concatenate([left, right]))
