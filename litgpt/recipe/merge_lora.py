"""The settings of `litgpt merge_lora`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Ge, Le

from litgpt.recipe.bounds import Seed, check_numbers
from litgpt.recipe.generate import InferencePrecision

RowCount = Annotated[int, Ge(0), Le(1000)]


@dataclass(frozen=True)
class MergeLora:
    """Merge an adapter into its base model."""

    checkpoint_dir: Path
    """Folder of the adapter (litgpt's, PEFT's or LitGPT's), of a training checkpoint, or of a run."""
    pretrained_checkpoint_dir: Path | None = None
    """Folder of the base model; null for the base model that the adapter names."""
    precision: InferencePrecision | None = None
    """Precision of the merged model; null for that of the run if the adapter records it, else of the base model."""
    output_dir: Path | None = None
    """Output folder; null for the folder of the adapter, or <step>-merged beside a training checkpoint."""
    quantize: (
        Literal["as_trained", "bnb.nf4", "bnb.nf4-dq", "bnb.fp4", "bnb.fp4-dq", "bnb.int8-training", "torchao.nf4"]
        | None
    ) = "as_trained"
    """Quantization of the base model that the adapter is merged into; as_trained for that of the run, null for none."""
    rows: RowCount = 2
    """Number of rows of random tokens on which merged and unmerged logits are compared; 0 skips it to save memory."""
    seed: Seed = 42
    """Random seed of the tokens."""

    def __post_init__(self) -> None:
        check_numbers(self)
