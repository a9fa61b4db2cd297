"""The settings of `litgpt data prepare`, `litgpt data inspect` and `litgpt tokenizer`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Ge, Le

from litgpt.recipe.bounds import BatchSize, Count, Positive, Seed, VocabularySize, check_numbers
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
    page_file: Path | None = None
    """HTML page for samples of conversations or answers, with their images."""

    def __post_init__(self) -> None:
        check_numbers(self)


@dataclass(frozen=True)
class CodecArgs:
    """The image codes of `kind: vq`, and how they are trained."""

    size: Annotated[int, Ge(4), Le(4096)] = 32
    """Height and width in pixels that images are resized to."""
    patch: Annotated[int, Ge(2), Le(64)] = 4
    """Height and width in pixels that one code stands for, a power of two: an image has (size / patch)^2 codes."""
    levels: list[int] = field(default_factory=lambda: [8, 6, 5])
    """Levels of each channel of a code (Mentzer et al. 2023, FSQ); their product is the number of codes."""
    width: Annotated[int, Ge(1), Le(4096)] = 64
    """Channels of the convolutions."""
    steps: Count = 1000
    """Number of optimizer steps."""
    batch_size: BatchSize = 64
    """Images of a step."""
    lr: Positive = 1e-3
    """Highest learning rate; it falls to 0 as a cosine."""
    seed: Seed = 42
    """Random seed of the weights, of the order, and of the images that are held out."""

    def __post_init__(self) -> None:
        check_numbers(self, "codec.")


@dataclass(frozen=True)
class TokenizerTrain:
    """Train a tokenizer on text, or one of images."""

    input: Path
    """Text file (.txt or .jsonl, also .gz and .zst), a folder of text files or, for vq, a folder of images."""
    output_dir: Path
    """Output folder, which must not exist."""
    vocab_size: VocabularySize = 8192
    """Vocabulary size of bpe, including special tokens."""
    kind: Literal["bpe", "bytes", "vq"] = "bpe"
    """Tokenizer type: bpe is byte-pair encoding; bytes has one token per byte; vq is one of images, as grids of
    codes."""
    bad_rows: Literal["stop", "skip"] = "stop"
    """How to handle rows that are not valid UTF-8 or JSON or have no text, and images that cannot be read: stop, or
    skip and count them."""
    codec: CodecArgs = field(default_factory=CodecArgs)
    """The image codes of vq."""

    def __post_init__(self) -> None:
        check_numbers(self)
        other, cure = f"kind: {self.kind}", "set kind: bpe"
        check_effects(self, "", "vocab_size", have_effect=self.kind == "bpe", other=other, cure=cure)
        check_effects(self, "", "codec", have_effect=self.kind == "vq", other=other, cure="set kind: vq")


@dataclass(frozen=True)
class TokenizerExtend:
    """Add the tokens of image codes to a model, which then reads and writes images."""

    checkpoint_dir: Path
    """Folder of a model."""
    codec_dir: Path
    """Folder of image codes: of `litgpt tokenizer train --kind vq`; Emu3, Janus or Chameleon, or their codes alone."""
    output_dir: Path
    """Folder of the model with more tokens, which must not exist."""
    size: Count | None = None
    """Height and width in pixels that images are resized to before Emu3's codes; null for 512. Others have one size."""
    seed: Seed = 42
    """Random seed of the rows of the new tokens."""

    def __post_init__(self) -> None:
        check_numbers(self)
