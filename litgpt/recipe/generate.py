"""The settings of `litgpt generate`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Ge, Le

from litgpt.errors import UserError
from litgpt.recipe.bounds import Count, Fraction, Seed, check_numbers
from litgpt.recipe.effect import check_effects

Penalty = Annotated[float, Ge(-2.0), Le(2.0)]
LogprobCount = Annotated[int, Ge(0), Le(1000)]
Temperature = Annotated[float, Ge(0.0), Le(1e6)]
InferenceQuantFormat = Literal["bnb.nf4", "bnb.nf4-dq", "bnb.fp4", "bnb.fp4-dq", "bnb.int8"]
InferencePrecision = Literal["32-true", "16-true", "bf16-true", "64-true", "bf16-mixed", "16-mixed"]


@dataclass(frozen=True, kw_only=True)
class GenerationSettings:
    """The model of a command that generates text, and how its texts are generated."""

    sys_prompt: str | None = None
    """The system's message; for models with a chat template."""
    chat_template: bool | None = None
    """Apply the folder's chat template to the prompt: false for never, null for its prompt style or template if any."""
    max_new_tokens: Count = 50
    """Maximum number of tokens of a text; the model may stop earlier."""
    top_k: Count | None = 50
    """Sample among this many of the most likely tokens; null for all."""
    top_p: Fraction = 1.0
    """Sample among the most likely tokens whose probabilities sum to this; 0 for the most likely one."""
    temperature: Temperature = 0.8
    """Sampling temperature: below 1 for more likely tokens, above 1 for more varied ones; 0 for the most likely one."""
    min_p: Fraction = 0.0
    """Sample among the tokens whose probability is at least this share of the largest."""
    repetition_penalty: Annotated[float, Ge(0.01), Le(100.0)] = 1.0
    """Make the tokens of prompt and text less likely: positive logits are divided by it, negative ones multiplied."""
    presence_penalty: Penalty = 0.0
    """Subtracted from the logit of each token that is in the text."""
    frequency_penalty: Penalty = 0.0
    """Subtracted from the logit of a token for each time that it is in the text."""
    json_schema: str | None = None
    """A JSON schema that each text is valid under, or the path of a file with one."""
    regex: str | None = None
    """A regular expression that each text matches."""
    stop: str | list[str] | None = None
    """A string or a list of strings at which a text ends; they are not printed."""
    seed: Seed = 1234
    """Random seed of the sampling."""
    quantize: InferenceQuantFormat | None = None
    """Quantize the matrices of the blocks to 4 or 8 bits with bitsandbytes."""
    precision: InferencePrecision | None = None
    """Precision; null for bf16-true on an accelerator, and for the dtype of the files on a CPU."""
    compile: bool = False
    """Compile the model with torch.compile: slower to start, then faster."""

    def __post_init__(self) -> None:
        check_numbers(self)
        if self.json_schema is not None and self.regex is not None:
            raise UserError("regex: a text follows either json_schema or regex; leave one of them out")


@dataclass(frozen=True)
class Generate(GenerationSettings):
    """Generate text with a model."""

    checkpoint_dir: Path
    """Folder of a model, of a run or of one of its steps, or org/name on the hub (downloaded if necessary)."""
    prompt: str = "What food do llamas eat?"
    """The user's message or, without a chat template, the text to continue."""
    prompts: Path | None = None
    """A file of prompts instead: a .txt with one a line, or a .jsonl with `prompt` or `messages` in each row."""
    output: Path | None = None
    """The .jsonl file for the texts of `prompts`, in their order; null for stdout."""
    logprobs: LogprobCount | None = None
    """Write the log-probability of each token and of this many of the most likely ones, with `prompts`."""
    num_samples: Count = 1
    """Number of texts to generate, one after the other."""
    stream: bool = True
    """Print the text as it is generated; false to print it when it is complete."""

    def __post_init__(self) -> None:
        super().__post_init__()
        has_file = self.prompts is not None
        other, cure = "a single prompt", "set prompts: FILE too"
        check_effects(self, "", "output", "logprobs", have_effect=has_file, other=other, cure=cure)
        check_effects(self, "", "stream", "prompt", have_effect=not has_file, other="prompts", cure="leave it out")
        if self.prompts is not None and not self.prompts.is_file():
            raise UserError(f"prompts: {self.prompts} is not a file; use a .txt with one prompt a line, or a .jsonl")
