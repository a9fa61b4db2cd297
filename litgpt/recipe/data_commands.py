"""The settings of `litgpt data prepare`, `litgpt data inspect` and `litgpt tokenizer train`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from litgpt.recipe.bounds import Count, Seed, VocabularySize, check_numbers
from litgpt.recipe.data import DataModule
from litgpt.recipe.effect import check_effects


@dataclass(frozen=True)
class DataPrepare:
    """Download, tokenize and count the data of a run in advance."""

    data: DataModule
    """Data module."""
    tokenizer_dir: Path | None = None
    """Folder of the tokenizer; not needed for data that is already tokenized."""
    max_seq_length: Count = 1024
    """Sequence length, in tokens, for counting samples; train.max_seq_length, its name in a run, is accepted too."""

    def __post_init__(self) -> None:
        check_numbers(self)


@dataclass(frozen=True)
class DataInspect:
    """Show the data of a run: counts, and samples as text."""

    data: DataModule
    """Data module."""
    tokenizer_dir: Path | None = None
    """Folder of the tokenizer; without it, samples are shown as token ids."""
    max_seq_length: Count = 1024
    """Sequence length, in tokens; train.max_seq_length, its name in a run, is accepted too."""
    split: Literal["train", "val"] = "train"
    """The split to show."""
    samples: Count = 3
    """Number of samples to show."""
    seed: Seed = 42
    """Random seed that selects the samples."""

    def __post_init__(self) -> None:
        check_numbers(self)


@dataclass(frozen=True)
class TokenizerTrain:
    """Train a tokenizer on text."""

    input: Path
    """Text file (.txt or .jsonl, also .gz and .zst) or a folder of text files."""
    output_dir: Path
    """Output folder, which must not exist."""
    vocab_size: VocabularySize = 8192
    """Vocabulary size of bpe, including special tokens."""
    kind: Literal["bpe", "bytes"] = "bpe"
    """Tokenizer type: bpe is byte-pair encoding; bytes has one token per byte."""
    bad_rows: Literal["stop", "skip"] = "stop"
    """How to handle rows that are not valid UTF-8 or JSON or have no text: stop, or skip and count them."""

    def __post_init__(self) -> None:
        check_numbers(self)
        other, cure = "kind: bytes", "set kind: bpe"
        check_effects(self, "", "vocab_size", have_effect=self.kind == "bpe", other=other, cure=cure)
