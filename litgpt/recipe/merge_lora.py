"""Every setting of `litgpt merge_lora`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Ge, Le

from litgpt.recipe.bounds import Seed, check_numbers
from litgpt.recipe.generate import InferencePrecision

RowCount = Annotated[int, Ge(0), Le(1000)]


@dataclass(frozen=True)
class MergeLora:
    """Fold an adapter into the model that it was trained beside."""

    checkpoint_dir: Path
    """The adapter: a folder of ours or PEFT's, a training checkpoint of one, or the folder of its run."""
    pretrained_checkpoint_dir: Path | None = None
    """The model that the adapter is for; null for the one that it names."""
    precision: InferencePrecision | None = None
    """The numbers of the merged model; null for those of the run, where the adapter tells them, else of the model."""
    output_dir: Path | None = None
    """Where the merged model goes; null for the adapter's own folder, or <step>-merged beside a checkpoint."""
    quantize: (
        Literal["as_trained", "bnb.nf4", "bnb.nf4-dq", "bnb.fp4", "bnb.fp4-dq", "bnb.int8-training", "torchao.nf4"]
        | None
    ) = "as_trained"
    """The packing of the model that the adapter is added to; as_trained for what training saw, null for none."""
    rows: RowCount = 2
    """Rows of random tokens on which the merged model is held against the two apart; 0 for none, and less memory."""
    seed: Seed = 42
    """Which tokens."""

    def __post_init__(self) -> None:
        check_numbers(self)
