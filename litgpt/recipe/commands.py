"""The table of commands: the name of each, its recipe and its function."""

import difflib
import importlib
from collections.abc import Sequence
from typing import Any, NamedTuple

from litgpt.errors import UserError


class Command(NamedTuple):
    """A command.

    Attributes:
        recipe: `module:name` of the dataclass with its settings, in `litgpt.recipe`.
        module: the module in `litgpt.commands` whose function `run` runs it with a recipe.
        help: the line in `litgpt --help`.
        positionals: the keys that may be given without their names, in order.
    """

    recipe: str
    module: str
    help: str
    positionals: tuple[str, ...] = ()

    def import_recipe(self) -> type:
        """Import the dataclass with the settings."""
        return import_object(f"litgpt.recipe.{self.recipe}")


COMMANDS = {
    "pretrain": Command(
        "pretrain:Pretrain",
        "pretrain",
        "Pretrain a model on text, from scratch or from existing weights.",
        ("model_name",),
    ),
    "finetune": Command(
        "finetune:FinetuneLora",
        "finetune",
        "Finetune a model on conversations, with LoRA or another tuner.",
        ("checkpoint_dir",),
    ),
    "finetune_lora": Command("finetune:FinetuneLora", "finetune", "Same as finetune.", ("checkpoint_dir",)),
    "finetune_full": Command(
        "finetune:FinetuneFull", "finetune", "Finetune all or some of the weights of a model.", ("checkpoint_dir",)
    ),
    "finetune_adapter": Command(
        "finetune:FinetuneAdapter", "finetune", "Finetune a model with LLaMA-Adapter.", ("checkpoint_dir",)
    ),
    "finetune_adapter_v2": Command(
        "finetune:FinetuneAdapterV2", "finetune", "Finetune a model with LLaMA-Adapter V2.", ("checkpoint_dir",)
    ),
    "generate": Command("generate:Generate", "generate", "Generate text with a model.", ("checkpoint_dir",)),
    "download": Command(
        "store_commands:Download",
        "download",
        "Download a model's weights and tokenizer from the Hugging Face hub.",
        ("repo_id",),
    ),
    "convert_to_litgpt": Command(
        "store_commands:ConvertToLitgpt",
        "convert_to_litgpt",
        "Convert .bin, lit_model.pth or GGUF files, or a training checkpoint, to a model folder.",
        ("checkpoint_dir",),
    ),
    "convert_from_litgpt": Command(
        "store_commands:ConvertFromLitgpt",
        "convert_from_litgpt",
        "Export a model as a Hugging Face folder or in LitGPT's format.",
        ("checkpoint_dir", "output_dir"),
    ),
    "convert_pretrained_checkpoint": Command(
        "store_commands:ConvertPretrainedCheckpoint",
        "convert_pretrained_checkpoint",
        "Convert a training checkpoint to a model folder.",
        ("checkpoint_dir", "output_dir"),
    ),
    "merge_lora": Command(
        "merge_lora:MergeLora", "merge_lora", "Merge an adapter into its base model.", ("checkpoint_dir",)
    ),
    "validate": Command(
        "store_commands:Validate",
        "validate",
        "Check a model folder: files, config, tokenizer, tensors, memory.",
        ("checkpoint_dir",),
    ),
    "verify": Command(
        "store_commands:Verify",
        "verify",
        "Compare a model folder with transformers: tensors, logits, tokenizer.",
        ("checkpoint_dir",),
    ),
    "data prepare": Command(
        "data_commands:DataPrepare", "data_prepare", "Download and tokenize the data of a run in advance.", ("data",)
    ),
    "data inspect": Command(
        "data_commands:DataInspect", "data_inspect", "Show the data of a run: counts, and samples as text.", ("data",)
    ),
    "tokenizer train": Command(
        "data_commands:TokenizerTrain", "tokenizer_train", "Train a tokenizer on text.", ("input", "output_dir")
    ),
    "report": Command("report:Report", "report", "Write a self-contained HTML report of a run.", ("out_dir",)),
    "schema": Command(
        "schema:Schema",
        "schema",
        "Print the JSON Schema of the recipe of one or all commands, for editors.",
        ("command", "subcommand"),
    ),
}


def import_object(path: str) -> Any:
    """Import the object at `module:name`."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def find_command(argv: Sequence[str]) -> tuple[str, list[str]]:
    """Return the command that a command line begins with, and the remaining arguments."""
    for words in (2, 1):
        if (name := " ".join(argv[:words])) in COMMANDS:
            return name, list(argv[words:])
    given = " ".join(word for word in argv[:2] if not word.startswith("-"))
    subcommands = [name for name in COMMANDS if name.startswith(f"{argv[0]} ")]
    near = (
        subcommands
        or difflib.get_close_matches(given, COMMANDS, n=1)
        or difflib.get_close_matches(argv[0], COMMANDS, n=1)
    )
    hint = f"did you mean {' or '.join(near)}?" if near else f"the commands are {', '.join(COMMANDS)}"
    raise UserError(f"{given or argv[0]!r} is not a command; {hint}")
