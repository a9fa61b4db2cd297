"""Every setting of `litgpt generate`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Ge, Le

from litgpt.recipe.bounds import Count, Fraction, Seed, check_numbers

Temperature = Annotated[float, Ge(0.0), Le(1e6)]
Quantize = Literal["bnb.nf4", "bnb.nf4-dq", "bnb.fp4", "bnb.fp4-dq", "bnb.int8"]
InferencePrecision = Literal["32-true", "16-true", "bf16-true", "64-true", "bf16-mixed", "16-mixed"]


@dataclass(frozen=True)
class Generate:
    """Write text with a model."""

    checkpoint_dir: Path
    """A model's folder, a run's folder or one of its steps, or the hub's org/name (downloaded if it is not here)."""
    prompt: str = "What food do llamas eat?"
    """What the user says or, without a chat template, the text to go on with."""
    sys_prompt: str | None = None
    """What the system says; for models with a chat template."""
    num_samples: Count = 1
    """How many texts to write, one after the other."""
    max_new_tokens: Count = 50
    """The most tokens of a text; the model may end before that."""
    top_k: Count | None = 50
    """Choose among so many of the likeliest tokens; null for all."""
    top_p: Fraction = 1.0
    """Choose among the likeliest tokens that together have this probability; 0 takes the likeliest."""
    temperature: Temperature = 0.8
    """Below 1 for likelier tokens, above 1 for more varied ones; 0 takes the likeliest."""
    quantize: Quantize | None = None
    """Keep weights in 4 or 8 bits, through bitsandbytes."""
    precision: InferencePrecision | None = None
    """Numbers to compute with; null for bf16-true on an accelerator, on a CPU the type of the files."""
    compile: bool = False
    """Compile the model with torch.compile: slow to start, then faster."""
    stop: str | list[str] | None = None
    """A text, or a list of texts, that ends what is written; not printed."""
    seed: Seed = 1234
    """The same seed writes the same text."""
    stream: bool = True
    """Print the text as it comes; false prints it when it is whole."""
    chat_template: bool | None = None
    """Put the prompt into the folder's chat template: false for never, null for its prompt style or template if any."""

    def __post_init__(self) -> None:
        check_numbers(self)
