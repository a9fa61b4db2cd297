"""Token shards on disk: built once, memory-mapped, and rebuilt when the text or the tokenizer changes.

A folder holds tokens.bin (uint16 or uint32, little-endian, all documents concatenated), documents.bin (int64, the first
token of each document), tokens.json (what they were built from) and manifest.json (size and SHA-256 of each file). Its
name is a hash of everything that the tokens depend on.
"""

import hashlib
import sys
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from litgpt.data.cache.folders import build_once
from litgpt.data.read.documents import Corpus, SkippedRows, open_file_phase
from litgpt.data.tokenizer import Tokenizer
from litgpt.errors import UserError
from litgpt.files import DamagedFileError, read_json, write_json, write_manifest

TOKENS_FORMAT = 1
BATCH_CHARACTERS = 1_000_000
PART_CHARACTERS = 100_000


class TokenFile:
    """The tokens in a folder written by `prepare_tokens`, memory-mapped on first use.

    Raises:
        DamagedFileError: if a file is missing or truncated.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.metadata: dict[str, Any] = read_json(folder / "tokens.json")
        try:
            self.total, self.documents = int(self.metadata["tokens"]), int(self.metadata["documents"])
            self._dtype = np.dtype({"uint16": "<u2", "uint32": "<u4"}[self.metadata["dtype"]])
        except (KeyError, TypeError, ValueError):
            raise DamagedFileError(f"{folder / 'tokens.json'}: does not describe tokens; delete {folder}") from None
        self.fingerprint = folder.name
        for name, size in (("tokens.bin", self.total * self._dtype.itemsize), ("documents.bin", self.documents * 8)):
            if not (folder / name).is_file() or (folder / name).stat().st_size != size:
                raise DamagedFileError(
                    f"{folder / name}: missing or not {size} bytes; delete {folder} to build it again"
                )
        self._tokens: np.ndarray | None = None
        self._starts: np.ndarray | None = None

    def __getstate__(self) -> dict[str, Any]:
        # a worker maps the files itself: a pickled map would copy all of the text
        return {**self.__dict__, "_tokens": None, "_starts": None}

    def read(self, start: int, stop: int) -> np.ndarray:
        """Read tokens start .. stop-1."""
        if self._tokens is None:
            self._tokens = np.memmap(self.folder / "tokens.bin", dtype=self._dtype, mode="r")
        return self._tokens[start:stop]

    def find_document_starts(self, start: int, stop: int) -> np.ndarray:
        """Find the first tokens of documents among start .. stop-1."""
        if self._starts is None:
            self._starts = np.memmap(self.folder / "documents.bin", dtype="<i8", mode="r")
        low, high = np.searchsorted(self._starts, [start, stop])
        return np.array(self._starts[low:high])


def prepare_tokens(corpus: Corpus, tokenizer: Tokenizer, cache: Path) -> TokenFile:
    """Open the tokens of a corpus in `cache`; builds them first if they are missing.

    Two processes may call it at once; the second waits for the first. Files of interrupted processes are removed.

    Raises:
        UserError: if the text cannot be read, or the cache cannot be written.
    """
    sources = [asdict(source) for source in corpus.sources]
    key = [TOKENS_FORMAT, sources, tokenizer.fingerprint(), corpus.bos, corpus.eos, corpus.bad_rows]
    return TokenFile(build_once(cache, key, lambda staged: _build_tokens(corpus, tokenizer, staged)))


def _build_tokens(corpus: Corpus, tokenizer: Tokenizer, folder: Path) -> None:
    dtype = np.dtype("<u2" if tokenizer.id_limit <= 65536 else "<u4")
    skipped, starts, total, digest = SkippedRows(), array("q"), 0, hashlib.sha256()
    size = sum(source.bytes for source in corpus.sources)
    with open_file_phase(f"tokenizing {corpus.name}", size) as wrap_file, (folder / "tokens.bin").open("wb") as file:
        for batch in _group_texts(corpus.documents(wrap_file, skipped)):
            for tokens in encode_documents(tokenizer, batch):
                data = tokenizer.frame(tokens, bos=corpus.bos, eos=corpus.eos).astype(dtype).tobytes()
                starts.append(total)
                total += len(data) // dtype.itemsize
                digest.update(data)
                file.write(data)
    if total == 0:
        raise UserError(f"data: {corpus.name} has no tokens; the first error: {skipped.first or 'no documents'}")
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
    suffix = f", {skipped.count:,} rows skipped (first: {skipped.first})" if skipped.count else ""
    print(f"tokenized {corpus.name}: {len(starts):,} documents, {total:,} tokens{suffix}", file=sys.stderr)


def _group_texts(documents: Iterable[str], max_characters: int = BATCH_CHARACTERS) -> Iterator[list[str]]:
    """Group texts to about `max_characters`, which bounds the memory of encoding."""
    batch: list[str] = []
    size = 0
    for text in documents:
        batch.append(text)
        size += len(text)
        if size >= max_characters:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def encode_documents(tokenizer: Tokenizer, texts: list[str]) -> list[np.ndarray]:
    """Tokenize texts in parallel; long texts are split where that cannot change their tokens."""
    parts_of_texts = [split_text(tokenizer, text) for text in texts]
    encoded: list[np.ndarray] = []
    for batch in _group_texts(part for parts in parts_of_texts for part in parts):
        encoded += tokenizer.encode_batch(batch)
    tokens = iter(encoded)
    return [np.concatenate([next(tokens) for _ in parts]) for parts in parts_of_texts]


def split_text(tokenizer: Tokenizer, text: str, size: int = PART_CHARACTERS) -> list[str]:
    """Split a text into parts of at least `size` characters whose concatenated tokens are those of the whole text.

    It is split between a newline and a character that is not a space, and only where 500 characters on either side
    give the same tokens separately and together. A tokenizer that does not split words before merging, or that marks
    the start of every text, fails that test everywhere, and its texts stay whole.
    """
    if tokenizer.backend != "huggingface" or tokenizer.processor.pre_tokenizer is None:
        return [text]
    cuts, start = [0], 0
    while start + 2 * size < len(text):
        cut = next((i for i in _find_line_starts(text, start + size) if _is_safe_cut(tokenizer, text, i)), None)
        if cut is not None:
            cuts.append(cut)
        start = cut or start + size
    return [text[begin:end] for begin, end in zip(cuts, [*cuts[1:], len(text)], strict=True)]


def _find_line_starts(text: str, start: int, tries: int = 8) -> Iterator[int]:
    """Find a few lines at or after `start` that do not begin with a space."""
    for _ in range(tries):
        start = text.find("\n", start) + 1
        if start == 0 or start >= len(text):
            return
        if not text[start].isspace():
            yield start


def _is_safe_cut(tokenizer: Tokenizer, text: str, cut: int) -> bool:
    before, after = text[max(0, cut - 500) : cut], text[cut : cut + 500]
    whole, left, right = tokenizer.encode_batch([before + after, before, after])
    return np.array_equal(whole, np.concatenate([left, right]))
