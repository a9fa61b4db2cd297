"""Every setting of `litgpt data prepare`, `litgpt data inspect` and `litgpt tokenizer train`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from litgpt.recipe.bounds import Count, Seed, check_numbers
from litgpt.recipe.data import DataModule


@dataclass(frozen=True)
class DataPrepare:
    """Download and tokenize a run's data ahead of it, and count it."""

    data: DataModule
    """Where the text comes from."""
    tokenizer_dir: Path | None = None
    """Folder of the tokenizer; not needed for data that is tokens already."""
    max_seq_length: Count = 1024
    """Tokens in a sample, to count the samples."""

    def __post_init__(self) -> None:
        check_numbers(self)


@dataclass(frozen=True)
class DataInspect:
    """Show what a run would read: counts, and samples as text."""

    data: DataModule
    """Where the text comes from."""
    tokenizer_dir: Path | None = None
    """Folder of the tokenizer; without one, samples are shown as numbers."""
    max_seq_length: Count = 1024
    """Tokens in a sample."""
    split: Literal["train", "val"] = "train"
    """Which part to show."""
    samples: Count = 3
    """How many samples to show."""
    seed: Seed = 42
    """Which samples to show."""

    def __post_init__(self) -> None:
        check_numbers(self)


@dataclass(frozen=True)
class TokenizerTrain:
    """Make a tokenizer's folder from text."""

    input: Path
    """A text file (.txt, .jsonl, also .gz and .zst) or a folder of them."""
    output_dir: Path
    """The folder to make; it must not exist."""
    vocab_size: Count = 8192
    """Tokens that bpe learns, special ones included."""
    kind: Literal["bpe", "bytes"] = "bpe"
    """bpe learns byte pairs; bytes has one token a byte."""
    bad_rows: Literal["stop", "skip"] = "stop"
    """What to do with rows that are not UTF-8, not JSON or have no text: stop, or skip and count them."""

    def __post_init__(self) -> None:
        check_numbers(self)
