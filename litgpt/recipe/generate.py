"""The settings of `litgpt generate`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Ge, Le

from litgpt.recipe.bounds import Count, Fraction, Seed, check_numbers

Temperature = Annotated[float, Ge(0.0), Le(1e6)]
InferenceQuantFormat = Literal["bnb.nf4", "bnb.nf4-dq", "bnb.fp4", "bnb.fp4-dq", "bnb.int8"]
InferencePrecision = Literal["32-true", "16-true", "bf16-true", "64-true", "bf16-mixed", "16-mixed"]


@dataclass(frozen=True)
class Generate:
    """Generate text with a model."""

    checkpoint_dir: Path
    """Folder of a model, of a run or of one of its steps, or org/name on the hub (downloaded if necessary)."""
    prompt: str = "What food do llamas eat?"
    """The user's message or, without a chat template, the text to continue."""
    sys_prompt: str | None = None
    """The system's message; for models with a chat template."""
    num_samples: Count = 1
    """Number of texts to generate, one after the other."""
    max_new_tokens: Count = 50
    """Maximum number of tokens of a text; the model may stop earlier."""
    top_k: Count | None = 50
    """Sample among this many of the most likely tokens; null for all."""
    top_p: Fraction = 1.0
    """Sample among the most likely tokens whose probabilities sum to this; 0 for the most likely one."""
    temperature: Temperature = 0.8
    """Sampling temperature: below 1 for more likely tokens, above 1 for more varied ones; 0 for the most likely one."""
    quantize: InferenceQuantFormat | None = None
    """Quantize the matrices of the blocks to 4 or 8 bits with bitsandbytes."""
    precision: InferencePrecision | None = None
    """Precision; null for bf16-true on an accelerator, and for the dtype of the files on a CPU."""
    compile: bool = False
    """Compile the model with torch.compile: slower to start, then faster."""
    stop: str | list[str] | None = None
    """A string or a list of strings at which a text ends; they are not printed."""
    seed: Seed = 1234
    """Random seed of the sampling."""
    stream: bool = True
    """Print the text as it is generated; false to print it when it is complete."""
    chat_template: bool | None = None
    """Apply the folder's chat template to the prompt: false for never, null for its prompt style or template if any."""

    def __post_init__(self) -> None:
        check_numbers(self)
