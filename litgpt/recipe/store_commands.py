"""The settings of the commands that bring models in and out: download, convert, validate, verify."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Ge, Le

from litgpt.recipe.bounds import Count, Seed, check_numbers

Gigabytes = Annotated[float, Ge(1e-6), Le(1e6)]
Tolerance = Annotated[float, Ge(1e-12), Le(1.0)]
WeightType = Literal["float32", "float16", "bfloat16"]


@dataclass(frozen=True)
class Download:
    """Download a model's weights and tokenizer from the Hugging Face hub."""

    repo_id: str
    """The repository as org/name, a known model's name, or `list` to print those."""
    access_token: str | None = field(default=None, repr=False)
    """For models that ask for a licence to be accepted; null takes HF_TOKEN or the token of `hf auth login`."""
    tokenizer_only: bool = False
    """Leave the weights out."""
    convert_checkpoint: bool = True
    """Check the weights against the model's shape and write model_config.yaml beside them."""
    dtype: WeightType | None = None
    """Rewrite the weights in this type; null keeps theirs."""
    checkpoint_dir: Path = Path("checkpoints")
    """The model lands in <checkpoint_dir>/<org>/<name>."""
    model_name: str | None = None
    """The known model whose shape these weights have; null reads it from their config.json."""
    revision: str | None = None
    """A branch, tag or commit; null takes the main branch."""


@dataclass(frozen=True)
class ConvertToLitgpt:
    """Make a model folder out of .bin, lit_model.pth, GGUF files or a training checkpoint; check one of safetensors."""

    checkpoint_dir: Path
    """The folder, rewritten in place with its other files kept; or a .gguf file, whose folder is made beside it."""
    model_name: str | None = None
    """The known model whose shape the weights have; null reads it from the folder."""
    dtype: WeightType | None = None
    """Write the weights in this type; null keeps theirs."""
    debug_mode: bool | None = False
    """Print a line for every tensor."""


@dataclass(frozen=True)
class ConvertFromLitgpt:
    """Write a model for other programs: a Hugging Face folder, or LitGPT's own files."""

    checkpoint_dir: Path
    """The folder of the model, of a run or of one of its steps."""
    output_dir: Path
    """Where it goes; new or empty."""
    format: Literal["huggingface", "lit_model.pth", "model.pth"] = "huggingface"
    """A folder that transformers loads; one that LitGPT 0.5 loads; or one file of torch with published names."""
    dtype: WeightType | None = None
    """Write the weights in this type; null keeps theirs."""
    max_shard_size: Gigabytes = 5.0
    """Gigabytes from which on safetensors are split over files."""
    push_to_hub: str | None = None
    """Upload the folder to this org/name on the Hugging Face hub, which is made, private, if it is not there."""
    access_token: str | None = field(default=None, repr=False)
    """To upload; null takes HF_TOKEN or the token of `hf auth login`."""

    def __post_init__(self) -> None:
        check_numbers(self)


@dataclass(frozen=True)
class ConvertPretrainedCheckpoint:
    """Turn a training checkpoint into a clean model folder."""

    checkpoint_dir: Path
    """A step folder of a run, a run's folder (its latest step is taken), or a folder with a lit_model.pth."""
    output_dir: Path
    """Where the model goes; new or empty."""


@dataclass(frozen=True)
class Validate:
    """Check that a model folder can be used: files, shape, tokenizer, tensors, memory."""

    checkpoint_dir: Path
    """The folder of the model."""
    model_filename: str | None = None
    """The file with the weights; null takes those that loading would."""
    dtype: WeightType = "float32"
    """The type of the weights in the estimate of memory."""
    training: bool = False
    """Estimate the memory of training with AdamW: weights, gradients and two moments."""


@dataclass(frozen=True)
class Verify:
    """Hold a model folder against transformers: tensors, logits, tokenizer; and write it back to the bit."""

    checkpoint_dir: Path
    """The folder of the model."""
    report: Path | None = None
    """Write what was found to this file, as JSON."""
    rows: Count = 3
    """Rows of random tokens whose logits are compared."""
    length: Count = 64
    """Tokens in the longest row."""
    strings: Count = 200
    """Texts on which the tokenizers are compared."""
    tolerance: Tolerance = 1e-4
    """The largest difference of two logits, as a share of the largest logit."""
    seed: Seed = 42
    """Which tokens and texts."""

    def __post_init__(self) -> None:
        check_numbers(self)
