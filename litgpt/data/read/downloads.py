"""Download data sets from the Hugging Face hub and read their files."""

import json
import re
import shutil
import tarfile
import uuid
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import BinaryIO, cast

from litgpt.connection import check_hub_connection
from litgpt.data.read.documents import FileWrapper, convert_errors, open_file_phase
from litgpt.errors import UserError

HUB = "https://huggingface.co/datasets"
TINYSTORIES = f"{HUB}/roneneldan/TinyStories/resolve/main/TinyStories_all_data.tar.gz"
OPENWEBTEXT = "Skylion007/openwebtext"


def download_file(url: str, path: Path) -> None:
    """Download a file; an interrupted download leaves nothing behind.

    Raises:
        UserError: if the server cannot be reached or the download is incomplete.
    """
    import requests

    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        with requests.get(url, stream=True, timeout=30) as response, partial.open("wb") as file:
            response.raise_for_status()
            size = int(response.headers.get("Content-Length", 0))
            response.raw.decode_content = False
            with open_file_phase(f"downloading {path.name}", size) as wrap_file:
                shutil.copyfileobj(wrap_file(cast(BinaryIO, response.raw)), file, 1 << 20)
        if size and partial.stat().st_size != size:
            raise UserError(f"{url}: incomplete, {partial.stat().st_size} of {size} bytes; try again")
        partial.replace(path)
    except (requests.RequestException, OSError) as error:
        raise UserError(f"{url}: cannot be downloaded ({str(error)[:200]}); put the file at {path}") from None
    finally:
        partial.unlink(missing_ok=True)


def download_tinystories(folder: Path) -> Path:
    """Return the path of the archive of all stories; downloads it first if needed."""
    path = folder / "TinyStories_all_data.tar.gz"
    if not path.is_file():
        download_file(TINYSTORIES, path)
    return path


def read_stories(archive: Path, split: str, wrap_file: FileWrapper) -> Iterator[str]:
    """Read the stories in the archive's first file (`val`) or in all others (`train`) without extracting it to disk.

    Raises:
        UserError: if the archive is damaged or has other contents.
    """

    def read() -> Iterator[str]:
        with archive.open("rb") as raw, tarfile.open(fileobj=wrap_file(raw), mode="r|gz") as members:
            for member in members:
                name = re.fullmatch(r"(?:\./)?data(\d+)\.json", member.name)
                file = members.extractfile(member) if name and (int(name[1]) == 0) == (split == "val") else None
                for row in json.load(file) if file else ():
                    yield row["story"].strip()

    def convert(error: Exception) -> UserError:
        return UserError(
            f"{archive}: damaged, or not the TinyStories archive ({error}); delete it to download it again"
        )

    errors = (tarfile.TarError, EOFError, OSError, ValueError, KeyError, TypeError, AttributeError)
    return convert_errors(read(), errors, convert)


def download_openwebtext(folder: Path) -> list[Path]:
    """List the parquet files of OpenWebText; downloads them first if needed.

    Raises:
        UserError: if they cannot be downloaded.
    """
    marker = folder / "parquet" / "complete"
    if not marker.is_file():
        from huggingface_hub import snapshot_download

        try:
            check_hub_connection()
            snapshot_download(
                OPENWEBTEXT, repo_type="dataset", allow_patterns=["*.parquet"], local_dir=folder / "parquet"
            )
        except Exception as error:  # the hub raises errors of several libraries
            raise UserError(f"data: {OPENWEBTEXT} cannot be downloaded ({str(error)[:200]}); check access") from None
        marker.touch()
    files = sorted((folder / "parquet").rglob("*.parquet"))
    if not files:
        raise UserError(f"data: no parquet files in {folder / 'parquet'}; delete the folder to download it again")
    return files


def read_parquet_texts(files: list[Path], wrap_file: FileWrapper) -> Iterator[str]:
    """Read the column `text` of parquet files, row by row.

    Raises:
        UserError: if pyarrow is not installed, or a file is damaged.
    """
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise UserError("data: pyarrow is not installed: pip install 'litgpt[data]'") from None

    def read(path: Path) -> Iterator[str]:
        with path.open("rb") as raw:
            for rows in ParquetFile(wrap_file(raw)).iter_batches(columns=["text"]):
                yield from (text for text in rows.column("text").to_pylist() if text)

    def convert(path: Path, error: Exception) -> UserError:
        return UserError(f"{path}: damaged, or no column text ({str(error)[:200]})")

    for path in files:
        yield from convert_errors(read(path), (ArrowException, OSError, KeyError), partial(convert, path))
