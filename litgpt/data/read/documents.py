"""Read documents from text files: .txt (one document per file) and .jsonl (one per line), plain, gzip or zstandard."""

import gzip
import itertools
import json
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeVar

from litgpt.data.read.fields import BadRow
from litgpt.data.read.message import check_media
from litgpt.errors import UserError
from litgpt.files import (
    DamagedFileError,
    EncodingError,
    check_encoding,
    decode_utf8,
    find_surrogate,
    read_json,
    sha256,
    write_json,
)
from litgpt.phases import phase

TEXT_SUFFIXES = tuple(kind + compression for kind in (".txt", ".jsonl") for compression in ("", ".gz", ".zst"))
BadRows = Literal["stop", "skip"]
FileWrapper = Callable[[BinaryIO], BinaryIO]
"""Wraps an open file, to count what is read."""
T = TypeVar("T")


@dataclass(frozen=True)
class Source:
    """A file (or other text) that a cache was built from: its name, size and SHA-256.

    Class and field names are part of cache keys and of the fingerprints in checkpoints.
    """

    name: str
    bytes: int
    sha256: str


def convert_errors(
    items: Iterable[T], errors: type[Exception] | tuple[type[Exception], ...], convert: Callable[[Any], UserError]
) -> Iterator[T]:
    """Iterate over items; errors of reading one are converted, those of the consumer are not."""
    iterator = iter(items)
    while True:
        # no `yield` inside of `try`, since a generator may be closed or thrown into while it waits there
        try:
            item = next(iterator)
        except StopIteration:
            return
        except errors as error:
            raise convert(error) from None
        yield item


class SkippedRows:
    """Counts skipped files and rows, and remembers the first."""

    def __init__(self) -> None:
        self.count = 0
        self.first = ""

    def add(self, message: str) -> None:
        """Count one skipped row."""
        self.first = self.first or message
        self.count += 1


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


@contextmanager
def open_file_phase(title: str, total: int) -> Iterator[FileWrapper]:
    """Open a phase that counts the bytes read from the files wrapped by the yielded function."""
    from rich.progress import Progress

    counter = Progress(disable=True)
    task = counter.add_task(title, total=total)
    with phase(title, total, percent=True) as entry:
        entry.done = lambda: counter.tasks[0].completed
        yield lambda file: counter.wrap_file(file, task_id=task)


def list_text_files(path: Path, key: str) -> list[Path]:
    """List the text files of a folder sorted by name, or just `path` if it is a file.

    Raises:
        UserError: naming `key`, if there is no text file.
    """
    if path.is_file() and path.name.endswith(TEXT_SUFFIXES):
        return [path]
    if not path.is_dir():
        raise UserError(f"{key}: {path} is not a folder of text files; use one with {', '.join(TEXT_SUFFIXES)} files")
    files = sorted(file for file in path.iterdir() if file.is_file() and file.name.endswith(TEXT_SUFFIXES))
    if not files:
        raise UserError(f"{key}: no text files in {path}; their names must end in {', '.join(TEXT_SUFFIXES)}")
    return files


def read_documents(
    path: Path,
    *,
    bad_rows: BadRows = "stop",
    bad_rows_key: str = "",
    skipped: SkippedRows | None = None,
    wrap_file: FileWrapper = lambda file: file,
) -> Iterator[str]:
    """Read the documents of one file. A .txt file is one document; its line ends become "\\n" as in Python's text mode.

    Args:
        bad_rows: `stop` at the first row that is not UTF-8, not JSON, or without a non-empty `text`; or `skip` it.
        bad_rows_key: the key of `bad_rows` in the recipe, which errors name; empty for none.
        skipped: counts the skipped rows.
        wrap_file: wraps the open file, to count what is read.

    Raises:
        UserError: naming file and line. A truncated archive raises under either policy.
    """
    skipped = skipped or SkippedRows()
    with path.open("rb") as raw:
        lines = number_lines(path, decompress_lines(path, wrap_file(raw)))
        if ".jsonl" in path.suffixes[-2:]:
            rows: Iterator[tuple[int, bytes]] = ((number, line) for number, line in lines if line.strip())
            decode: Callable[[bytes], str] = _decode_json
        else:
            rows, decode = iter([(1, b"".join(line for _, line in lines))]), _decode_text
        for number, row in rows:
            # no `yield` inside of `try`, so that an error of the consumer is never taken for one of the file
            try:
                text = decode(row)
            except (EncodingError, BadRow) as error:
                message = f"{path}:{number + getattr(error, 'line', 1) - 1}: {error}"
                if bad_rows == "stop":
                    cure = f"fix it, or set {bad_rows_key}: skip" if bad_rows_key else "fix it"
                    raise UserError(f"{message}; {cure}") from None
                skipped.add(message)
                continue
            yield text


def _decode_text(row: bytes) -> str:
    text = decode_utf8(row)
    if not text:
        raise BadRow("empty")
    return text


def _decode_json(row: bytes) -> str:
    text = decode_utf8(row)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadRow("not JSON", str(error)) from None
    document = value.get("text") if isinstance(value, dict) else None
    if not isinstance(document, str) or not document:
        raise BadRow('"text" is missing or empty')
    if find_surrogate(document) is not None:
        raise BadRow('"text" contains an unpaired surrogate')
    check_media(value, "row")
    return document


def decompress_lines(path: Path, raw: BinaryIO) -> Iterable[bytes]:
    """Iterate over the lines of a plain, gzip or zstandard file."""
    if path.suffix == ".gz":
        return gzip.open(raw)
    return _zstandard_lines(raw) if path.suffix == ".zst" else raw


def _zstandard_lines(raw: BinaryIO) -> Iterator[bytes]:
    """Iterate over the lines of zstandard frames; zstandard's own reader accepts truncated frames."""
    from zstandard import ZstdDecompressor

    frame, rest = ZstdDecompressor().decompressobj(), list[bytes]()
    while compressed := raw.read(1 << 18):
        while compressed:
            frame = ZstdDecompressor().decompressobj() if frame.eof else frame
            first, *others = frame.decompress(compressed).split(b"\n")
            rest.append(first)
            for line in others:
                yield b"".join([*rest, b"\n"])
                rest = [line]
            compressed = frame.unused_data
    if not frame.eof:
        raise EOFError("truncated frame")
    if any(rest):
        yield b"".join(rest)


def number_lines(path: Path, file: Iterable[bytes]) -> Iterator[tuple[int, bytes]]:
    """Number the lines of a file from 1.

    Raises:
        UserError: if the file is damaged or truncated, or has the byte order mark of another encoding than UTF-8.
    """
    lines = iter(file)
    for number in itertools.count(1):
        try:
            line = next(lines, None)
            if number == 1:
                check_encoding(line or b"")
        except EncodingError as error:
            raise UserError(f"{path}: {error}; convert it to UTF-8") from None
        except Exception as error:
            import zstandard

            if not isinstance(error, EOFError | gzip.BadGzipFile | zlib.error | zstandard.ZstdError):
                raise
            raise UserError(
                f"{path}:{number}: cannot be decompressed, the file is damaged or truncated ({error})"
            ) from None
        if line is None:
            return
        yield number, line


def fingerprint_files(files: list[Path], hash_file: Path) -> list[Source]:
    """Name, size and SHA-256 of files; hashes are cached in `hash_file` by size and modification time.

    Args:
        files: all in one folder, or with distinct names.
        hash_file: a JSON file, updated with new hashes.
    """
    try:
        known = read_json(hash_file) if hash_file.is_file() else {}
    except DamagedFileError:
        known = {}
    sources, fresh = [], {}
    for path in files:
        status = path.stat()
        stamp = [status.st_size, status.st_mtime_ns]
        entry = known.get(str(path.resolve())) if isinstance(known, dict) else None
        with phase(f"hashing {path.name}"):
            digest = entry[2] if isinstance(entry, list) and entry[:2] == stamp else sha256(path)
        # a file written within the clock's resolution may change again under the same modification time
        if time.time_ns() - status.st_mtime_ns > 2_000_000_000:
            fresh[str(path.resolve())] = [*stamp, digest]
        sources.append(Source(path.name, status.st_size, digest))
    if any(known.get(name) != entry for name, entry in fresh.items()):
        with suppress(OSError):  # on a read-only disk hashes are computed every time
            write_json(hash_file, known | fresh)
    return sources
