"""The settings of the commands that download, convert, validate and verify models."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Ge, Le

from litgpt.errors import UserError
from litgpt.recipe.bounds import Count, Seed, check_numbers
from litgpt.recipe.effect import check_effects

Gigabytes = Annotated[float, Ge(1e-6), Le(1e6)]
Tolerance = Annotated[float, Ge(1e-12), Le(1.0)]
WeightType = Literal["float32", "float16", "bfloat16"]


@dataclass(frozen=True)
class Download:
    """Download a model's weights and tokenizer from the Hugging Face hub."""

    repo_id: str
    """Repository as org/name, the name of a known model, or `list` to print the known models."""
    access_token: str | None = field(default=None, repr=False)
    """Hugging Face access token, for gated models; null for HF_TOKEN or the token of `hf auth login`."""
    tokenizer_only: bool = False
    """Download the tokenizer without the weights."""
    convert_checkpoint: bool = True
    """Check the weights against the model configuration and write model_config.yaml."""
    dtype: WeightType | None = None
    """Convert the weights to this dtype; null keeps their dtype."""
    checkpoint_dir: Path = Path("checkpoints")
    """Parent folder; the model is saved to <checkpoint_dir>/<org>/<name>."""
    model_name: str | None = None
    """Name of the known model whose configuration the weights have; null to read config.json."""
    revision: str | None = None
    """Branch, tag or commit; null for the main branch."""


@dataclass(frozen=True)
class ConvertToLitgpt:
    """Convert .bin, lit_model.pth or GGUF files, or a training checkpoint, to a model folder; check safetensors."""

    checkpoint_dir: Path
    """Folder, which is converted in place; or a .gguf file, which is converted to a folder beside it."""
    model_name: str | None = None
    """Name of the known model whose configuration the weights have; null to read it from the folder."""
    dtype: WeightType | None = None
    """Convert the weights to this dtype; null keeps their dtype."""
    debug_mode: bool | None = False
    """Print a line for every tensor."""


@dataclass(frozen=True)
class ConvertFromLitgpt:
    """Export a model as a Hugging Face folder, in LitGPT's format, or as a GGUF file; or an adapter for vLLM."""

    checkpoint_dir: Path
    """Folder of a model, a run or a training checkpoint; of an adapter for format: vllm."""
    output_dir: Path
    """Output folder, new or empty."""
    format: Literal["huggingface", "lit_model.pth", "model.pth", "gguf", "vllm"] = "huggingface"
    """A Hugging Face folder, lit_model.pth for LitGPT 0.5, one torch file with the published tensor names, a GGUF file
    for llama.cpp with a Modelfile for Ollama, or a LoRA adapter that vLLM applies in full."""
    dtype: WeightType | Literal["q8_0"] | None = None
    """Convert the weights to this dtype, in a GGUF file also q8_0, 8-bit blocks; null keeps their dtype."""
    max_shard_size: Gigabytes = 5.0
    """Maximum size of a safetensors file, in GB."""
    push_to_hub: str | None = None
    """Upload to this org/name on the Hugging Face hub; a new repository is private."""
    access_token: str | None = field(default=None, repr=False)
    """Hugging Face access token for the upload; null for HF_TOKEN or the token of `hf auth login`."""

    def __post_init__(self) -> None:
        check_numbers(self)
        if self.dtype == "q8_0" and self.format != "gguf":
            raise UserError(f"dtype: q8_0 is not supported with format: {self.format}; set bfloat16, or format: gguf")
        has_shards, other = self.format == "huggingface", f"format: {self.format}"
        check_effects(self, "", "max_shard_size", have_effect=has_shards, other=other, cure="leave it out")


@dataclass(frozen=True)
class ConvertPretrainedCheckpoint:
    """Convert a training checkpoint, also of Megatron-core (torch_dist), to a model folder."""

    checkpoint_dir: Path
    """Training checkpoint, folder of a run (its latest checkpoint is used), or a folder with a lit_model.pth."""
    output_dir: Path
    """Output folder, new or empty."""
    model_name: str | None = None
    """Name of the known model whose configuration the weights have; null to read it from the folder."""


@dataclass(frozen=True)
class Validate:
    """Check a model folder: files, config, tokenizer, tensors, memory."""

    checkpoint_dir: Path
    """Folder of the model."""
    model_filename: str | None = None
    """File with the weights; null for the files that are loaded by default."""
    dtype: WeightType = "float32"
    """Dtype of the weights in the memory estimate."""
    training: bool = False
    """Estimate the memory for training with AdamW: weights, gradients and two moments."""


@dataclass(frozen=True)
class Verify:
    """Compare a model folder with transformers: tensors, logits, tokenizer and a bit-exact export."""

    checkpoint_dir: Path
    """Folder of the model."""
    report: Path | None = None
    """Path of a JSON report."""
    rows: Count = 3
    """Number of rows of random tokens whose logits are compared."""
    length: Count = 64
    """Length of the longest row, in tokens."""
    strings: Count = 200
    """Number of strings on which the tokenizers are compared."""
    tolerance: Tolerance = 1e-4
    """Maximum difference of logits, relative to the largest logit."""
    seed: Seed = 42
    """Random seed of the tokens and strings."""

    def __post_init__(self) -> None:
        check_numbers(self)
