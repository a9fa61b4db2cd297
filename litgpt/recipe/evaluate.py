"""The settings of `litgpt evaluate`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Ge, Le

from litgpt.recipe.bounds import Count, Position, Seed, check_numbers
from litgpt.recipe.effect import check_effects
from litgpt.recipe.train import split_names

Limit = Annotated[float, Ge(1e-9), Le(1e9)]


@dataclass(frozen=True)
class Evaluate:
    """Evaluate a model on tasks of lm-eval, on a text file, or on prompts with answers."""

    checkpoint_dir: Path
    """Folder of a model, an adapter, a run or one of its steps, or org/name on the hub (downloaded if necessary)."""
    tasks: str | list[str] | None = None
    """Tasks or groups of lm-eval, a list or separated by commas; null without `text` or `prompts` prints all."""
    text: Path | None = None
    """Text file whose bits per byte and token perplexity are computed."""
    prompts: Path | None = None
    """A .jsonl file with `prompt` or `messages`, `images` and `answer` in each row; exact answers are counted."""
    max_new_tokens: Count = 50
    """Maximum number of tokens of the text after each of `prompts`."""
    out_dir: Path | None = None
    """Folder for the results; null for `evaluate` in checkpoint_dir."""
    save_filepath: Path | None = None
    """File for the scores as JSON; null for results.json in out_dir."""
    include_path: Path | None = None
    """Folder with tasks of your own: YAML files of lm-eval."""
    num_fewshot: Position | None = None
    """Number of solved examples in each prompt; null for that of the task."""
    limit: Limit | None = None
    """Number of samples of each task, from the first one; a fraction of them below 1; null for all."""
    chat_template: bool = False
    """Apply the folder's chat template to the prompts."""
    sys_prompt: str | None = None
    """The system's message, with chat_template: true, or the beginning of each prompt."""
    use_cache: Path | None = None
    """Keep the answers of the model in a database with this name, and read those that it has."""
    batch_size: Count | str = "auto"
    """Number of texts in a forward pass, or auto for as many as fit; it does not change the scores."""
    window: Count | None = None
    """Number of tokens of `text` that the model sees at a time; null for its context."""
    stride: Count | None = None
    """Number of tokens by which the window moves over `text`; null for half of it."""
    device: str | None = None
    """Device, such as cuda:1 or cpu; null for the accelerator of this machine, if any."""
    dtype: Literal["float64", "float32", "float16", "bfloat16"] | None = None
    """Type of the weights; null for bfloat16 on an accelerator, and for the type of the files on a CPU."""
    seed: Seed = 1234
    """Random seed of the few-shot examples and of the sampling."""
    force_conversion: bool = False
    """Of LitGPT, which converts the model first; here no model is converted, and true prints so."""
    access_token: str | None = field(default=None, repr=False)
    """Hugging Face access token for gated models; null for HF_TOKEN or the token of `hf auth login`."""

    def __post_init__(self) -> None:
        check_numbers(self)
        task_keys = ("num_fewshot", "limit", "chat_template", "sys_prompt", "use_cache", "batch_size")
        has_tasks, has_text, has_prompts = (value is not None for value in (self.tasks, self.text, self.prompts))
        check_effects(self, "", *task_keys, have_effect=has_tasks, other="tasks: null", cure="set tasks")
        check_effects(self, "", "window", "stride", have_effect=has_text, other="text: null", cure="set text")
        other, cure = "prompts: null", "set prompts"
        check_effects(self, "", "max_new_tokens", have_effect=has_prompts, other=other, cure=cure)

    @property
    def task_names(self) -> list[str]:
        """The names of the tasks."""
        return split_names(self.tasks)
