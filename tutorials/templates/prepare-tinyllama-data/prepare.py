"""Tokenize SlimPajama and StarCoder with LitData, on all cores, into the folders that the data module TinyLlama reads.

Files are converted in groups. A group that is complete is kept in `<out>/parts`, so that the same command continues
after an interruption, also with another number of workers. The groups are merged at the end.
"""

import argparse
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
import zstandard
from litdata import TokensLoader, merge_datasets, optimize

from litgpt import Tokenizer


def read_texts(path: str) -> Iterator[str]:
    """The documents of a file of SlimPajama (.jsonl.zst, `text`) or StarCoder (.parquet, `content`)."""
    if path.endswith(".parquet"):
        from pyarrow.parquet import ParquetFile

        for rows in ParquetFile(path).iter_batches(columns=["content"]):
            yield from rows.column("content").to_pylist()
    else:
        with zstandard.open(path, "rt", encoding="utf-8") as lines:
            yield from (json.loads(line)["text"] for line in lines)


def encode(path: str, tokenizer: str) -> Iterator[torch.Tensor]:
    """The tokens of each document of a file, with the end token."""
    encoder = Tokenizer(tokenizer)
    for text in read_texts(path):
        yield encoder.encode(text, bos=False, eos=True)


def name_part(files: list[str], tokenizer: Path) -> str:
    """A name that changes with the files of a group, their sizes and the tokenizer."""
    sizes = [[path, os.path.getsize(path)] for path in files]
    vocabulary = [(tokenizer / name).read_bytes() for name in sorted(os.listdir(tokenizer)) if "tokenizer" in name]
    return hashlib.sha256(json.dumps(sizes).encode() + b"".join(vocabulary)).hexdigest()[:16]


def replace_folder(staged: Path, folder: Path) -> None:
    """Give a complete folder its name."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    staged.rename(folder)


def convert(files: list[str], folder: Path, settings: argparse.Namespace) -> None:
    """Write the tokens of a group of files to a new folder."""
    staged = folder.with_suffix(".incomplete")
    shutil.rmtree(staged, ignore_errors=True)
    optimize(
        partial(encode, tokenizer=str(settings.tokenizer)),
        files,
        output_dir=str(staged),
        chunk_bytes=settings.chunk_bytes,
        item_loader=TokensLoader(),
        num_workers=min(settings.workers, len(files)),
    )
    replace_folder(staged, folder)


def prepare(source: Path, name: str, settings: argparse.Namespace) -> None:
    """Convert the files below a folder to `<out>/<name>`."""
    target, parts_folder = settings.out / name, settings.out / "parts" / name
    if target.is_dir():
        shutil.rmtree(parts_folder, ignore_errors=True)
        print(f"{target} is complete")
        return
    files = sorted(str(path) for path in source.rglob("*") if path.name.endswith((".jsonl.zst", ".parquet")))
    if not files:
        raise SystemExit(f"{source}: no .jsonl.zst or .parquet files")
    parts = []
    for first in range(0, len(files), settings.group):
        group = files[first : first + settings.group]
        part = parts_folder / name_part(group, settings.tokenizer)
        parts.append(part)
        if part.is_dir():
            print(f"{name}: files {first + 1} to {first + len(group)} of {len(files)} are complete")
        else:
            convert(group, part, settings)
            print(f"{name}: converted files {first + 1} to {first + len(group)} of {len(files)}", flush=True)
    staged = parts_folder / "merged.incomplete"
    shutil.rmtree(staged, ignore_errors=True)
    if len(parts) > 1:
        merge_datasets([str(part) for part in parts], str(staged))
    else:
        shutil.copytree(parts[0], staged)
    replace_folder(staged, target)
    shutil.rmtree(parts_folder)


def main() -> None:
    """Convert what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--slimpajama", type=Path, help="folder with the folders train and validation")
    parser.add_argument("--starcoder", type=Path, help="folder with parquet files")
    parser.add_argument("--tokenizer", type=Path, default=Path("checkpoints/meta-llama/Llama-2-7b-hf"))
    parser.add_argument("--out", type=Path, default=Path("data"))
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes")
    parser.add_argument("--group", type=int, default=512, help="files that an interruption may lose the work on")
    parser.add_argument("--chunk_bytes", default="64MB", help="size of the files that are written")
    settings = parser.parse_args()
    if settings.slimpajama is None and settings.starcoder is None:
        parser.error("set --slimpajama, --starcoder or both")
    if settings.slimpajama:
        prepare(settings.slimpajama / "train", "slimpajama/train", settings)
        prepare(settings.slimpajama / "validation", "slimpajama/val", settings)
    if settings.starcoder:
        prepare(settings.starcoder, "starcoder", settings)


if __name__ == "__main__":
    main()
