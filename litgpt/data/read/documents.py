"""Documents out of text files: .txt (one document each) and .jsonl (one a line), plain, gzipped or zstandard."""

import gzip
import json
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

from litgpt.errors import UserError
from litgpt.files import DamagedFileError, read_json, sha256, write_json

TEXT_SUFFIXES = tuple(kind + packing for kind in (".txt", ".jsonl") for packing in ("", ".gz", ".zst"))
BadRows = Literal["stop", "skip"]


@dataclass(frozen=True)
class Source:
    """A file (or other text) that token shards were made from: its name, size and SHA-256."""

    name: str
    bytes: int
    sha256: str


class SkippedRows:
    """How many files and rows were passed over, and the first of them."""

    def __init__(self) -> None:
        self.count = 0
        self.first = ""

    def add(self, fault: str) -> None:
        """Count one."""
        self.first = self.first or fault
        self.count += 1


def list_text_files(path: Path, key: str) -> list[Path]:
    """The text files of a folder in the order of their names, or the one file that `path` is.

    Raises:
        UserError: naming `key`, if there are none.
    """
    if path.is_file() and path.name.endswith(TEXT_SUFFIXES):
        return [path]
    if not path.is_dir():
        raise UserError(f"{key}: {path} is no folder of text files; give one with {', '.join(TEXT_SUFFIXES)} files")
    found = sorted(file for file in path.iterdir() if file.is_file() and file.name.endswith(TEXT_SUFFIXES))
    if not found:
        raise UserError(f"{key}: no text files in {path}; their names must end in {', '.join(TEXT_SUFFIXES)}")
    return found


def read_documents(
    path: Path,
    *,
    bad_rows: BadRows = "stop",
    skipped: SkippedRows | None = None,
    watch: Callable[[BinaryIO], BinaryIO] = lambda file: file,
) -> Iterator[str]:
    """The documents in one file. A .txt file is read whole; line ends become "\\n" as in Python's text mode.

    Args:
        bad_rows: `stop` at the first row that is not UTF-8, not JSON, has no `text` or an empty one; or `skip` it.
        skipped: counts what was skipped.
        watch: wraps the open file, to show how far reading has come.

    Raises:
        UserError: naming file and line. An archive that is cut short stops under either policy.
    """
    skipped = skipped or SkippedRows()
    with path.open("rb") as raw:
        lines = number_lines(path, decompress_lines(path, watch(raw)))
        if ".jsonl" in path.suffixes[-2:]:
            rows: Iterator[tuple[int, bytes]] = ((number, line) for number, line in lines if line.strip())
            read: Callable[[bytes], str] = _decode_json
        else:
            rows, read = iter([(1, b"".join(line for _, line in lines))]), _decode_text
        for number, row in rows:
            try:
                yield read(row)
            except _RowError as fault:
                message = f"{path}:{number + fault.lines}: {fault}"
                if bad_rows == "stop":
                    raise UserError(f"{message}; mend it, or set bad_rows: skip") from None
                skipped.add(message)


class _RowError(Exception):
    """What is wrong with a row, and how many lines into it."""

    def __init__(self, message: str, lines: int = 0) -> None:
        super().__init__(message)
        self.lines = lines


def _decode_text(row: bytes) -> str:
    try:
        text = row.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _RowError(f"not UTF-8 (byte 0x{row[error.start]:02x})", row.count(b"\n", 0, error.start)) from None
    if not text:
        raise _RowError("empty")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _decode_json(row: bytes) -> str:
    try:
        value = json.loads(row)
    except UnicodeDecodeError as error:
        raise _RowError(f"not UTF-8 (byte 0x{row[error.start]:02x})") from None
    except (json.JSONDecodeError, RecursionError) as error:
        raise _RowError(f"not JSON ({error})") from None
    text = value.get("text") if isinstance(value, dict) else None
    if not isinstance(text, str) or not text:
        raise _RowError('no "text" in this row, or an empty one')
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise _RowError('"text" holds half a surrogate pair') from None
    return text


def decompress_lines(path: Path, raw: BinaryIO) -> Iterable[bytes]:
    """The lines of a file, whatever it is packed in."""
    if path.suffix == ".gz":
        return gzip.open(raw)
    return _zstandard_lines(raw) if path.suffix == ".zst" else raw


def _zstandard_lines(raw: BinaryIO) -> Iterator[bytes]:
    """The lines of one or more zstandard frames; the library's own reader takes a frame cut short for its end."""
    from zstandard import ZstdDecompressor

    frame, rest = ZstdDecompressor().decompressobj(), list[bytes]()
    while packed := raw.read(1 << 18):
        while packed:
            frame = ZstdDecompressor().decompressobj() if frame.eof else frame
            first, *others = frame.decompress(packed).split(b"\n")
            rest.append(first)
            for other in others:
                yield b"".join([*rest, b"\n"])
                rest = [other]
            packed = frame.unused_data
    if not frame.eof:
        raise EOFError("it ends within a frame")
    if any(rest):
        yield b"".join(rest)


def number_lines(path: Path, file: Iterable[bytes]) -> Iterator[tuple[int, bytes]]:
    """The lines of a file from number 1; a UserError if it cannot be unpacked to its end."""
    number = 0
    try:
        for number, line in enumerate(file, 1):
            yield number, line
    except Exception as error:
        import zstandard

        if not isinstance(error, EOFError | gzip.BadGzipFile | zlib.error | zstandard.ZstdError):
            raise
        raise UserError(
            f"{path}:{number + 1}: cannot be unpacked, the file is damaged or cut short ({error})"
        ) from None


def fingerprint_files(files: list[Path], memory: Path) -> list[Source]:
    """Name, size and SHA-256 of files; the hash of a file whose size and date are in `memory` is taken from there.

    Args:
        files: all in one folder, or told apart by name.
        memory: a JSON file, renewed when hashes were taken.
    """
    try:
        known = read_json(memory) if memory.is_file() else {}
    except DamagedFileError:
        known = {}
    sources, fresh = [], {}
    for path in files:
        status = path.stat()
        stamp = [status.st_size, status.st_mtime_ns]
        entry = known.get(str(path.resolve())) if isinstance(known, dict) else None
        digest = entry[2] if isinstance(entry, list) and entry[:2] == stamp else sha256(path)
        # a file that was written this very moment may change again without a new date
        if time.time_ns() - status.st_mtime_ns > 2_000_000_000:
            fresh[str(path.resolve())] = [*stamp, digest]
        sources.append(Source(path.name, status.st_size, digest))
    if any(known.get(name) != entry for name, entry in fresh.items()):
        with suppress(OSError):  # on a read-only disk hashes are taken every time
            write_json(memory, known | fresh)
    return sources
