"""The settings of `litgpt download` and `litgpt convert_pretrained_checkpoint`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal


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
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    """Rewrite the weights in this type; null keeps theirs."""
    checkpoint_dir: Path = Path("checkpoints")
    """The model lands in <checkpoint_dir>/<org>/<name>."""
    model_name: str | None = None
    """The known model whose shape these weights have; null reads it from their config.json."""
    revision: str | None = None
    """A branch, tag or commit; null takes the main branch."""


@dataclass(frozen=True)
class ConvertPretrainedCheckpoint:
    """Turn a training checkpoint into a clean model folder."""

    checkpoint_dir: Path
    """A step folder of a run, a run's folder (its latest step is taken), or a folder with a lit_model.pth."""
    output_dir: Path
    """Where the model goes; new or empty."""
