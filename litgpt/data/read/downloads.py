"""Data sets that are fetched from the Hugging Face hub, and how their files are read."""

import json
import re
import tarfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, cast

from litgpt.data.read.progress import Watch, progress_bar
from litgpt.errors import UserError

HUB = "https://huggingface.co/datasets"
TINYSTORIES = f"{HUB}/roneneldan/TinyStories/resolve/main/TinyStories_all_data.tar.gz"
OPENWEBTEXT = "Skylion007/openwebtext"


def download_file(url: str, path: Path) -> None:
    """Download a file whole or not at all, with a progress bar.

    Raises:
        UserError: if it cannot be reached or ends early.
    """
    import requests

    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        with requests.get(url, stream=True, timeout=30) as reply, partial.open("wb") as file:
            reply.raise_for_status()
            size = int(reply.headers.get("Content-Length", 0))
            reply.raw.decode_content = False
            with progress_bar(f"downloading {path.name}", size) as watch:
                body = watch(cast(BinaryIO, reply.raw))
                while block := body.read(1 << 20):
                    file.write(block)
        if size and partial.stat().st_size != size:
            raise UserError(f"{url}: ended after {partial.stat().st_size} of {size} bytes; try again")
        partial.replace(path)
    except (requests.RequestException, OSError) as error:
        reason = str(error)[:200]
        raise UserError(f"{url}: cannot be downloaded ({reason}); or put the file at {path} yourself") from None
    finally:
        partial.unlink(missing_ok=True)


def download_tinystories(folder: Path) -> Path:
    """The archive of all stories, fetched if it is not there."""
    path = folder / "TinyStories_all_data.tar.gz"
    if not path.is_file():
        download_file(TINYSTORIES, path)
    return path


def read_stories(archive: Path, part: str, watch: Watch) -> Iterator[str]:
    """The stories in the archive's first file (`val`) or in all others (`train`); nothing is unpacked to disk.

    Raises:
        UserError: if the archive is damaged or holds something else.
    """
    try:
        with archive.open("rb") as raw, tarfile.open(fileobj=watch(raw), mode="r|gz") as members:
            for member in members:
                name = re.fullmatch(r"(?:\./)?data(\d+)\.json", member.name)
                file = members.extractfile(member) if name and (int(name[1]) == 0) == (part == "val") else None
                for row in json.load(file) if file else ():
                    yield row["story"].strip()
    except (tarfile.TarError, EOFError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{archive}: damaged, or not the stories ({error}); remove it and it is fetched again"
        ) from None


def download_openwebtext(folder: Path) -> list[Path]:
    """The parquet files of OpenWebText, fetched if they are not there.

    Raises:
        UserError: if they cannot be reached.
    """
    done = folder / "parquet" / "complete"
    if not done.is_file():
        from huggingface_hub import snapshot_download

        try:
            snapshot_download(
                OPENWEBTEXT, repo_type="dataset", allow_patterns=["*.parquet"], local_dir=folder / "parquet"
            )
        except Exception as error:  # the hub raises errors of several libraries
            raise UserError(f"data: {OPENWEBTEXT} cannot be downloaded ({str(error)[:200]}); go online") from None
        done.touch()
    files = sorted((folder / "parquet").rglob("*.parquet"))
    if not files:
        raise UserError(f"data: no parquet files in {folder / 'parquet'}; remove it and it is fetched again")
    return files


def read_parquet_texts(files: list[Path], watch: Watch) -> Iterator[str]:
    """The column `text` of parquet files, row by row.

    Raises:
        UserError: if pyarrow is not installed, or a file is damaged.
    """
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise UserError("data: parquet files need the package pyarrow; `pip install pyarrow`") from None
    for path in files:
        try:
            with path.open("rb") as raw:
                for rows in ParquetFile(watch(raw)).iter_batches(columns=["text"]):
                    yield from (text for text in rows.column("text").to_pylist() if text)
        except (ArrowException, OSError, KeyError) as error:
            raise UserError(f"{path}: damaged, or without a column text ({str(error)[:200]})") from None
