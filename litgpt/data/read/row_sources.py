"""Rows out of files: .jsonl, .json, .csv, .parquet and .txt, in folders or on the Hugging Face hub."""

import csv
import json
import sys
from codecs import BOM_UTF8, iterdecode
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, get_args

from litgpt.data.read.conversation import Format
from litgpt.data.read.documents import decompress_lines, number_lines
from litgpt.data.read.fields import BadRow
from litgpt.data.read.json_list import iter_json_list
from litgpt.errors import UserError
from litgpt.files import join_inside
from litgpt.recipe.keys import find_nearest

COMPRESSIONS = ("", ".gz", ".zst")
ROW_SUFFIXES = (
    *(kind + packing for kind in (".jsonl", ".json", ".csv", ".txt") for packing in COMPRESSIONS),
    ".parquet",
)
LocatedRow = tuple[str, Mapping[str, Any] | BadRow]
"""Where a row stands, as file:line, and the row, or why it is none."""


@dataclass(frozen=True)
class DataSource:
    """One set of rows.

    Attributes:
        path: a file, a folder of them, or the name of a data set on the hub; `#500` behind it is `sample`.
        split: of a hub's data set or a folder: only files whose names hold this word.
        format: how rows are read; auto tells by their columns.
        columns: the rows' names of columns, and the names that are meant.
        sample: how many rows an epoch has of it: a number, or a share such as 0.1; None for all. More than there are
            repeats them.
        weight: its share of the samples where sources are interleaved, relative to the others'.
        channel: the group that its loss is reported in, where a row names none.
        val_fraction: the share of its rows kept for validation; None as the data module says.
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
        kinds: dict[str, tuple[Any, ...]] = {
            "path": (str,),
            "split": (str, type(None)),
            "format": (str,),
            "columns": (dict, type(None)),
            "sample": (int, float, type(None)),
            "weight": (int, float),
            "channel": (str, type(None)),
            "val_fraction": (int, float, type(None)),
        }
        for name, allowed in kinds.items():
            value = getattr(self, name)
            if not isinstance(value, allowed) or isinstance(value, bool):
                raise UserError(f"data.sources: {name}: {value!r} will not do; give {EXAMPLES[name]}")
        if self.format not in get_args(Format):
            raise UserError(f"data.sources: format: {self.format!r} is not known; give {', '.join(get_args(Format))}")
        low_high = {"sample": (0, 1e12), "weight": (0, 1e6), "val_fraction": (0, 1)}
        for name, (low, high) in low_high.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise UserError(f"data.sources: {name}: {value} will not do; give {EXAMPLES[name]}")
        if self.sample is not None and self.sample > 1 and self.sample != int(self.sample):
            raise UserError(f"data.sources: sample: {self.sample} will not do; give {EXAMPLES['sample']}")


EXAMPLES = {
    "path": "a file, a folder or a data set's name on the hub",
    "split": "a part of file names, such as train",
    "format": "auto",
    "columns": "keys and values such as {my_question: query}",
    "sample": "a number of rows such as 500, or a share such as 0.1",
    "weight": "a number from 0, such as 1.0",
    "channel": "a name",
    "val_fraction": "a share such as 0.05",
}


def parse_source(value: Any) -> DataSource:
    """A source as a recipe gives it: a path, which may end with `#500`, or a mapping.

    Raises:
        UserError: naming the key that will not do.
    """
    if isinstance(value, DataSource):
        return value
    given = {"path": value} if isinstance(value, str | Path) else value
    if not isinstance(given, dict) or "path" not in given:
        raise UserError(f"data.sources: {value!r} will not do; give a path, or path and other keys")
    known = [field.name for field in fields(DataSource)]
    for key in given:
        if key not in known:
            near = find_nearest(str(key), known)
            raise UserError(f"data.sources: {key} is not a key; " + (f"did you mean {near}?" if near else f"{known}"))
    path, sample = split_sample(str(given["path"]))
    if sample is not None and given.get("sample") is not None:
        raise UserError(
            f"data.sources: {given['path']} names a sample, and sample: {given['sample']} another; give one"
        )
    return DataSource(**(given | {"path": path} | ({} if sample is None else {"sample": sample})))


def split_sample(path: str) -> tuple[str, int | None]:
    """A path and the number of rows behind its `#`; a file whose own name has one is taken as it is."""
    front, mark, number = path.rpartition("#")
    if not mark or Path(path).exists() or not (number.isascii() and number.isdigit()):
        return path, None
    return front, int(number)


def list_files(source: DataSource, downloads: Path) -> list[Path]:
    """The files of a source, in the order of their names; a data set of the hub is fetched into `downloads`.

    Raises:
        UserError: if there are none, or the hub cannot be reached.
    """
    path = Path(source.path).expanduser()
    if path.is_file():
        if not path.name.endswith(ROW_SUFFIXES):
            raise UserError(f"data.sources: {path}: of no known kind; give {', '.join(ROW_SUFFIXES)}")
        return [path]
    folder = path if path.is_dir() else download_dataset(source.path, downloads)
    found = sorted(file for file in folder.rglob("*") if file.is_file() and file.name.endswith(ROW_SUFFIXES))
    found = [file for file in found if not any(part.startswith(".") for part in file.relative_to(folder).parts)]
    found = [file for file in found if source.split is None or source.split in file.name]
    if not found:
        what = f" whose name holds {source.split}" if source.split else ""
        raise UserError(f"data.sources: {folder} holds no file{what} that ends in {', '.join(ROW_SUFFIXES)}")
    return found


def download_dataset(name: str, downloads: Path, token: str | None = None) -> Path:
    """The folder of a data set of the hub, downloaded if it is not there."""
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise UserError(f"data.sources: {name}: no such file or folder, nor a name on the hub such as org/name")
    folder = join_inside(downloads, name.replace("/", "--"))
    done = folder / ".complete"
    if not done.is_file():
        from huggingface_hub import snapshot_download

        patterns = [f"*{suffix}" for suffix in ROW_SUFFIXES]
        try:
            snapshot_download(name, repo_type="dataset", allow_patterns=patterns, local_dir=folder, token=token)
        except Exception as error:  # the hub raises errors of several libraries
            reason = " ".join(str(error).split())[:160]
            raise UserError(f"data: {name}: no such file, and not to be had from the hub ({reason})") from None
        done.touch()
    return folder


def read_rows(path: Path) -> Iterator[LocatedRow]:
    """The rows of a file in order, each with where it stands; a row that cannot be read is a BadRow.

    Raises:
        UserError: for a file that cannot be read at all, such as one cut short.
    """
    kind = path.suffixes[-2] if path.suffix in (".gz", ".zst") and len(path.suffixes) > 1 else path.suffix
    try:
        yield from FILE_READERS[kind](path)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}; mend that, or give another path") from None


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    with path.open("rb") as raw:
        yield from number_lines(path, decompress_lines(path, raw))


def _read_jsonl(path: Path) -> Iterator[LocatedRow]:
    return ((f"{path}:{number}", parse_json(line)) for number, line in _lines(path) if line.strip())


def _read_json(path: Path) -> Iterator[LocatedRow]:
    first = next((kept[:1] for piece in _blocks(path) if (kept := piece.removeprefix(BOM_UTF8).lstrip())), b"")
    if first == b"[":
        yield from _read_list(path)
        return
    rows = parse_json(b"".join(_blocks(path)))
    if isinstance(rows, BadRow) and first == b"{":
        yield from _read_jsonl(path)  # many call JSON lines .json
        return
    if not isinstance(rows, Mapping):
        fault = rows if isinstance(rows, BadRow) else f"holds {type(rows).__name__}"
        raise UserError(f"{path}: {fault}; give a list of objects, or one object a line")
    lists = [value for value in rows.values() if isinstance(value, list)]  # under a name of its own
    named = lists[0] if len(rows) == 1 and lists and all(isinstance(row, dict) for row in lists[0]) else [rows]
    yield from ((f"{path}[{number}]", row) for number, row in enumerate(named))


def _read_list(path: Path) -> Iterator[LocatedRow]:
    try:
        for number, row in enumerate(iter_json_list(iterdecode(_blocks(path), "utf-8-sig"))):
            yield f"{path}[{number}]", row
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 (byte 0x{error.object[error.start]:02x}); write it as UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({str(error)[:80]}); give a list of objects, or one object a line") from None


def _blocks(path: Path) -> Iterator[bytes]:
    """The bytes of a file, a megabyte or a line at a time."""
    with path.open("rb") as raw:
        if path.suffix in (".gz", ".zst"):
            yield from (line for _, line in number_lines(path, decompress_lines(path, raw)))
        else:
            yield from iter(partial(raw.read, 1 << 20), b"")


def _read_text(path: Path) -> Iterator[LocatedRow]:
    text = _decode(b"".join(line for _, line in _lines(path)))
    yield str(path), text if isinstance(text, BadRow) else {"text": text.replace("\r\n", "\n").replace("\r", "\n")}


def _read_csv(path: Path) -> Iterator[LocatedRow]:
    csv.field_size_limit(sys.maxsize)  # a document may be longer than the 128 KiB that Python allows a field
    lines = (line.decode("utf-8", "surrogateescape") for _, line in _lines(path))
    rows = csv.DictReader(lines, restkey="", strict=True)
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            raise UserError(f"{path}:{rows.line_num}: not CSV ({error})") from None
        broken = any(isinstance(value, str) and _has_surrogates(value) for value in row.values())
        fault = BadRow("not UTF-8") if broken else BadRow("more fields than columns") if "" in row else None
        yield f"{path}:{rows.line_num}", fault or row


def _read_parquet(path: Path) -> Iterator[LocatedRow]:
    return ((f"{path}[{number - 1}]", row) for number, row in read_parquet_rows(path, 0, lambda number: True))


def read_parquet_rows(path: Path, behind: int, mine: Callable[[int], bool]) -> Iterator[tuple[int, Any]]:
    """The rows of a parquet file with their numbers from 1; groups of rows that lie behind are not read.

    Args:
        behind: how many rows to pass over.
        mine: which of the others are wanted, by their numbers.

    Raises:
        UserError: if pyarrow is not installed, or the file is damaged.
    """
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise UserError(f"{path}: needs the package pyarrow; `pip install litgpt[data]`") from None
    number = 0
    try:
        file = ParquetFile(path)
        for group in range(file.num_row_groups):
            if (size := file.metadata.row_group(group).num_rows) + number <= behind:
                number += size
                continue
            for batch in file.iter_batches(batch_size=1024, row_groups=[group]):
                numbers = range(number + 1, number + 1 + batch.num_rows)
                if wanted := [one for one in numbers if one > behind and mine(one)]:
                    yield from zip(wanted, batch.take([one - number - 1 for one in wanted]).to_pylist(), strict=True)
                number += batch.num_rows
    except (ArrowException, UnicodeDecodeError) as error:
        raise UserError(f"{path}: damaged, or no parquet file ({str(error)[:160]})") from None


FILE_READERS: dict[str, Callable[[Path], Iterator[LocatedRow]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".txt": _read_text,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}


def _has_surrogates(text: str) -> bool:
    return not text.isascii() and any("\udc80" <= letter <= "\udcff" for letter in text)


def _decode(raw: bytes) -> str | BadRow:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return BadRow("not UTF-8", f"byte 0x{raw[error.start]:02x}")


def parse_json(raw: bytes) -> Any:
    """What a text says as JSON; a BadRow if it does not."""
    text = _decode(raw)
    if isinstance(text, BadRow):
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        return BadRow("not JSON", str(error)[:80])
