"""Read rows from files: .jsonl, .json, .csv, .parquet and .txt, in folders or on the Hugging Face hub."""

import csv
import itertools
import json
import math
import sys
from codecs import BOM_UTF8, getincrementaldecoder
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args

from litgpt.connection import check_hub_connection
from litgpt.data.read.conversation import Format
from litgpt.data.read.documents import convert_errors, decompress_lines, number_lines
from litgpt.data.read.fields import BadRow
from litgpt.data.read.json_list import iter_json_list
from litgpt.errors import UserError
from litgpt.files import EncodingError, decode_utf8, find_surrogate, join_inside
from litgpt.recipe.config_hub import find_hub_file
from litgpt.recipe.keys import find_nearest

COMPRESSIONS = ("", ".gz", ".zst")
ROW_SUFFIXES = (
    *(kind + compression for kind in (".jsonl", ".json", ".csv", ".txt") for compression in COMPRESSIONS),
    ".parquet",
)
COMPLETE = ".complete"  # the file in the folder of a data set that was downloaded
LocatedRow = tuple[str, Mapping[str, Any] | BadRow]
"""The location of a row, as file:line, and the row, or the reason why it is invalid."""


@dataclass(frozen=True)
class DataSource:
    """One source of rows, as a recipe names it.

    Attributes:
        path: a file, a folder of files, or the name of a data set on the hub; a suffix `#500` sets `sample`.
        split: of a data set on the hub, or a folder: only files whose names contain this word.
        format: how rows are read; auto detects it from the columns.
        columns: renames columns, from the name in the file to the expected name.
        sample: rows of the source that are used, for training and validation together: a number, or a fraction such as
            0.1; None for all. More than the source has repeats rows in training.
        weight: sampling weight where sources are interleaved, relative to the others.
        channel: the group that the loss is reported in, where a row names none.
        val_fraction: the fraction of rows held out for validation; None for the data module's.
    """

    path: str
    split: str | None = None
    format: Format = "auto"
    columns: dict[str, str] | None = None
    sample: float | None = None
    weight: float = 1.0
    channel: str | None = None
    val_fraction: float | None = None

    def __post_init__(self) -> None:
        for name, (allowed, example) in SETTINGS.items():
            value = getattr(self, name)
            if not isinstance(value, allowed) or isinstance(value, bool):
                raise UserError(f"data.sources: {name}: {value!r} is not supported; use {example}")
        if self.format not in get_args(Format):
            raise UserError(f"data.sources: format: {self.format!r} is unknown; use {', '.join(get_args(Format))}")
        bounds = {"sample": (0, 1e12), "weight": (0, 1e6), "val_fraction": (0, 1)}
        for name, (low, high) in bounds.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise UserError(f"data.sources: {name}: {value} is out of range; use {SETTINGS[name][1]}")
        if self.sample is not None and self.sample > 1 and self.sample != int(self.sample):
            raise UserError(f"data.sources: sample: {self.sample} is not a whole number; use {SETTINGS['sample'][1]}")


# the type of each setting of a source, and an example for errors
SETTINGS: dict[str, tuple[Any, str]] = {
    "path": (str, "a file, a folder or the name of a data set on the hub"),
    "split": (str | None, "a part of file names, such as train"),
    "format": (str, "auto"),
    "columns": (dict | None, "keys and values such as {my_question: query}"),
    "sample": (int | float | None, "a number of rows such as 500, or a fraction such as 0.1"),
    "weight": (int | float, "a number from 0, such as 1.0"),
    "channel": (str | None, "a name"),
    "val_fraction": (int | float | None, "a fraction such as 0.05"),
}


def parse_source(value: Any) -> DataSource:
    """Parse a source of a recipe: a path, which may end with `#500`, or a mapping.

    Raises:
        UserError: naming the invalid key.
    """
    if isinstance(value, DataSource):
        return value
    is_path = isinstance(value, str | Path) or type(value) is int  # a name of digits
    settings = {"path": value} if is_path else value
    if not isinstance(settings, dict) or "path" not in settings:
        raise UserError(f"data.sources: {value!r} is not a source; use a path, or a mapping with path and other keys")
    for key in settings:
        if key not in SETTINGS:
            nearest = find_nearest(str(key), SETTINGS)
            raise UserError(
                f"data.sources: {key} is not a key; "
                + (f"did you mean {nearest}?" if nearest else f"use {list(SETTINGS)}")
            )
    path, sample = split_sample(str(settings["path"]))
    if sample is not None and settings.get("sample") is not None:
        raise UserError(
            f"data.sources: {settings['path']} sets a sample size, and sample: {settings['sample']} another; set one"
        )
    return DataSource(**(settings | {"path": find_hub_file(path)} | ({} if sample is None else {"sample": sample})))


def split_sample(path: str) -> tuple[str, int | None]:
    """Split `path#500` into path and number of rows; a file whose own name contains `#` is not split."""
    front, separator, number = path.rpartition("#")
    if not separator or Path(path).exists() or not (number.isascii() and number.isdigit()):
        return path, None
    return front, int(number)


def list_files(source: DataSource, downloads: Path) -> list[Path]:
    """List the files of a source, sorted by name; a data set on the hub is downloaded into `downloads` first.

    Raises:
        UserError: if there are none, or the download fails.
    """
    path = Path(source.path).expanduser()
    if path.is_file():
        if not path.name.endswith(ROW_SUFFIXES):
            raise UserError(f"data.sources: {path}: unsupported file type; use {', '.join(ROW_SUFFIXES)}")
        return [path]
    folder = path if path.is_dir() else download_dataset(source.path, downloads)
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name.endswith(ROW_SUFFIXES))
    files = [file for file in files if not any(part.startswith(".") for part in file.relative_to(folder).parts)]
    files = [file for file in files if source.split is None or source.split in file.name]
    if not files:
        what = f" whose name contains {source.split}" if source.split else ""
        raise UserError(f"data.sources: {folder} has no file{what} that ends in {', '.join(ROW_SUFFIXES)}")
    return files


def find_media_folder(source: DataSource, downloads: Path, given: Path | None = None) -> Path:
    """The absolute folder of the files that rows name: the given one, or that of a source.

    For a data set on the hub that is the folder of downloads.
    """
    if given is not None:
        return given.expanduser().absolute()
    path = Path(source.path).expanduser().absolute()
    return path if path.is_dir() else path.parent if path.exists() else downloads.absolute()


def count_interleaved(sources: Sequence[DataSource], sizes: Sequence[int], ends_first: bool) -> list[int]:
    """Number of samples in an epoch from each source, in the proportion of the weights.

    Args:
        ends_first: whether the epoch ends when the first source is exhausted, or else when all are.

    Raises:
        UserError: if all weights are 0.
    """
    weights = [source.weight for source in sources]
    if not sum(weights):
        raise UserError("data.sources: weight: all are 0; set one that is not")
    shares = [weight / sum(weights) for weight in weights]
    epochs = [size / share for size, share in zip(sizes, shares, strict=True) if share]
    total = min(epochs) if ends_first else max(epochs)
    return [math.floor(total * share + 1e-9) for share in shares]


def check_hub_name(name: str) -> None:
    """Check that a source that is no file or folder may be a data set on the hub.

    Raises:
        UserError: if it is not of the form org/name.
    """
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise UserError(f"data.sources: {name}: no such file or folder, and not a data set on the hub such as org/name")


def find_download(name: str, downloads: Path) -> tuple[Path, bool]:
    """The folder of a data set on the hub, and whether it was downloaded before."""
    check_hub_name(name)
    folder = join_inside(downloads, name.replace("/", "--"))
    return folder, (folder / COMPLETE).is_file()


def check_dataset(name: str, downloads: Path) -> None:
    """Check that a data set on the hub was downloaded before, or that the hub can be reached.

    Raises:
        UserError: if neither, or it is not of the form org/name.
    """
    if not find_download(name, downloads)[1]:
        with raise_no_dataset(name):
            check_hub_connection()


def download_dataset(name: str, downloads: Path, token: str | None = None) -> Path:
    """Download a data set from the hub, unless that was done before; returns its folder."""
    folder, is_complete = find_download(name, downloads)
    if not is_complete:
        from huggingface_hub import snapshot_download

        patterns = [f"*{suffix}" for suffix in ROW_SUFFIXES]
        with raise_no_dataset(name):
            check_hub_connection()
            snapshot_download(name, repo_type="dataset", allow_patterns=patterns, local_dir=folder, token=token)
        (folder / COMPLETE).touch()
    return folder


@contextmanager
def raise_no_dataset(name: str) -> Iterator[None]:
    """Turn any error of the hub's client into one line about a data set."""
    try:
        yield
    except Exception as error:  # the hub raises errors of several libraries
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            f"data: {name}: no such file or folder, and cannot be downloaded from the hub ({reason}); check the path, "
            "or the network"
        ) from None


def read_rows(path: Path) -> Iterator[LocatedRow]:
    """Read the rows of a file in order, each with its location; a row that cannot be parsed is a BadRow.

    Raises:
        UserError: for a file that cannot be read, such as a truncated one.
    """
    suffix = path.suffixes[-2] if path.suffix in (".gz", ".zst") and len(path.suffixes) > 1 else path.suffix

    def convert(error: OSError) -> UserError:
        return UserError(f"{path}: {error.strerror or error}; fix that, or use another path")

    return convert_errors(FILE_READERS[suffix](path), OSError, convert)


def _read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    with path.open("rb") as raw:
        yield from number_lines(path, decompress_lines(path, raw))


def _read_jsonl(path: Path) -> Iterator[LocatedRow]:
    return ((f"{path}:{number}", parse_json(line)) for number, line in _read_lines(path) if line.strip())


def _read_json(path: Path) -> Iterator[LocatedRow]:
    first = next((text[:1] for block in _read_blocks(path) if (text := block.removeprefix(BOM_UTF8).lstrip())), b"")
    if first == b"[":
        yield from _read_list(path)
        return
    rows = parse_json(b"".join(_read_blocks(path)))
    if isinstance(rows, BadRow) and first == b"{":
        yield from _read_jsonl(path)  # JSON lines are often named .json
        return
    if not isinstance(rows, Mapping):
        reason = rows if isinstance(rows, BadRow) else f"contains {type(rows).__name__}"
        raise UserError(f"{path}: {reason}; use a list of objects or JSON lines")
    lists = [value for value in rows.values() if isinstance(value, list)]  # the list may be the value of a single key
    items = lists[0] if len(rows) == 1 and lists and all(isinstance(row, dict) for row in lists[0]) else [rows]
    yield from ((f"{path}[{number}]", row) for number, row in enumerate(items))


def _read_list(path: Path) -> Iterator[LocatedRow]:
    def convert(error: Exception) -> UserError:
        return UserError(f"{path}: not JSON ({str(error)[:80]}); use a list of objects or JSON lines")

    rows = convert_errors(iter_json_list(_decode_blocks(path)), (ValueError, RecursionError), convert)
    return ((f"{path}[{number}]", row) for number, row in enumerate(rows))


def _read_blocks(path: Path) -> Iterator[bytes]:
    """Read the bytes of a file, one megabyte or one line at a time."""
    with path.open("rb") as raw:
        is_plain = path.suffix not in (".gz", ".zst")
        blocks = iter(partial(raw.read, 1 << 20), b"") if is_plain else decompress_lines(path, raw)
        yield from (block for _, block in number_lines(path, blocks))


def _decode_blocks(path: Path) -> Iterator[str]:
    """Decode the text of a file block by block.

    Raises:
        UserError: if it is not UTF-8.
    """
    decoder, lines = getincrementaldecoder("utf-8-sig")(), 1
    for block in itertools.chain(_read_blocks(path), [b""]):
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            lines += error.object.count(b"\n", 0, error.start)
            byte = error.object[error.start]
            raise UserError(f"{path}:{lines}: not UTF-8 (byte 0x{byte:02x}); convert it to UTF-8") from None
        lines += block.count(b"\n")
        yield text


def _read_text(path: Path) -> Iterator[LocatedRow]:
    located: LocatedRow
    try:
        located = str(path), {"text": decode_utf8(b"".join(line for _, line in _read_lines(path)))}
    except EncodingError as error:
        located = f"{path}:{error.line}", BadRow(error.reason, error.detail)
    yield located


def _read_csv(path: Path) -> Iterator[LocatedRow]:
    csv.field_size_limit(sys.maxsize)  # Python's default limit of 128 KiB per field is too small for documents
    numbered = ((number, line.decode("utf-8", "surrogateescape")) for number, line in _read_lines(path))
    lines = (line if number > 1 else line.removeprefix("\ufeff") for number, line in numbered)
    rows = csv.DictReader(lines, restkey="", strict=True)
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            raise UserError(f"{path}:{rows.line_num}: not CSV ({error})") from None
        invalid = any(isinstance(value, str) and find_surrogate(value) is not None for value in [*row, *row.values()])
        bad_row = BadRow("not UTF-8") if invalid else BadRow("more fields than columns") if "" in row else None
        yield f"{path}:{rows.line_num}", bad_row or row


def _read_parquet(path: Path) -> Iterator[LocatedRow]:
    return ((f"{path}[{number - 1}]", row) for number, row in read_parquet_rows(path, 0, lambda _number: True))


def read_parquet_rows(path: Path, skip: int, is_wanted: Callable[[int], bool]) -> Iterator[tuple[int, Any]]:
    """Read the rows of a parquet file with their numbers from 1; row groups that are skipped whole are not read.

    Args:
        skip: number of rows to skip.
        is_wanted: selects rows by their numbers.

    Raises:
        UserError: if pyarrow is not installed, or the file is damaged.
    """
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise UserError(f"{path}: pyarrow is not installed: pip install 'litgpt[data]'") from None

    def read() -> Iterator[tuple[int, Any]]:
        number, file = 0, ParquetFile(path)
        for group in range(file.num_row_groups):
            if (size := file.metadata.row_group(group).num_rows) + number <= skip:
                number += size
                continue
            for batch in file.iter_batches(batch_size=1024, row_groups=[group]):
                numbers = range(number + 1, number + 1 + batch.num_rows)
                if wanted := [n for n in numbers if n > skip and is_wanted(n)]:
                    yield from zip(wanted, batch.take([n - number - 1 for n in wanted]).to_pylist(), strict=True)
                number += batch.num_rows

    def convert(error: Exception) -> UserError:
        return UserError(f"{path}: damaged, or not a parquet file ({str(error)[:160]})")

    return convert_errors(read(), (ArrowException, UnicodeDecodeError), convert)


FILE_READERS: dict[str, Callable[[Path], Iterator[LocatedRow]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".txt": _read_text,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}


def parse_json(raw: bytes) -> Any:
    """Parse JSON; returns a BadRow if it is invalid."""
    try:
        return json.loads(decode_utf8(raw))
    except EncodingError as error:
        return BadRow(error.reason, error.detail)
    except (ValueError, RecursionError) as error:
        return BadRow("not JSON", str(error)[:80])
