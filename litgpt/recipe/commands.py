"""The table of commands: the name of each, its recipe and its function."""

import difflib
import importlib
from collections.abc import Sequence
from typing import Any, NamedTuple

from litgpt.errors import UserError


class Command(NamedTuple):
    """A command.

    Attributes:
        recipe: `module:name` of the dataclass with its settings.
        run: `module:name` of the function that runs it with a recipe.
        help: the line in `litgpt --help`.
        positionals: the keys that may be given without their names, in order.
    """

    recipe: str
    run: str
    help: str
    positionals: tuple[str, ...] = ()


COMMANDS = {
    "pretrain": Command(
        "litgpt.recipe.pretrain:Pretrain",
        "litgpt.commands.pretrain:run",
        "Pretrain a model on text, from scratch or from existing weights.",
        ("model_name",),
    ),
    "finetune": Command(
        "litgpt.recipe.finetune:FinetuneLora",
        "litgpt.commands.finetune:run",
        "Finetune a model on conversations, with LoRA or another tuner.",
        ("checkpoint_dir",),
    ),
    "finetune_lora": Command(
        "litgpt.recipe.finetune:FinetuneLora",
        "litgpt.commands.finetune:run",
        "Same as finetune.",
        ("checkpoint_dir",),
    ),
    "finetune_full": Command(
        "litgpt.recipe.finetune:FinetuneFull",
        "litgpt.commands.finetune:run",
        "Finetune all or some of the weights of a model.",
        ("checkpoint_dir",),
    ),
    "finetune_adapter": Command(
        "litgpt.recipe.finetune:FinetuneAdapter",
        "litgpt.commands.finetune:run",
        "Finetune a model with LLaMA-Adapter.",
        ("checkpoint_dir",),
    ),
    "finetune_adapter_v2": Command(
        "litgpt.recipe.finetune:FinetuneAdapterV2",
        "litgpt.commands.finetune:run",
        "Finetune a model with LLaMA-Adapter V2.",
        ("checkpoint_dir",),
    ),
    "generate": Command(
        "litgpt.recipe.generate:Generate",
        "litgpt.commands.generate:run",
        "Generate text with a model.",
        ("checkpoint_dir",),
    ),
    "download": Command(
        "litgpt.recipe.store_commands:Download",
        "litgpt.commands.download:run",
        "Download a model's weights and tokenizer from the Hugging Face hub.",
        ("repo_id",),
    ),
    "convert_to_litgpt": Command(
        "litgpt.recipe.store_commands:ConvertToLitgpt",
        "litgpt.commands.convert_to_litgpt:run",
        "Convert .bin, lit_model.pth or GGUF files, or a training checkpoint, to a model folder.",
        ("checkpoint_dir",),
    ),
    "convert_from_litgpt": Command(
        "litgpt.recipe.store_commands:ConvertFromLitgpt",
        "litgpt.commands.convert_from_litgpt:run",
        "Export a model as a Hugging Face folder or in LitGPT's format.",
        ("checkpoint_dir", "output_dir"),
    ),
    "convert_pretrained_checkpoint": Command(
        "litgpt.recipe.store_commands:ConvertPretrainedCheckpoint",
        "litgpt.commands.convert_pretrained_checkpoint:run",
        "Convert a training checkpoint to a model folder.",
        ("checkpoint_dir", "output_dir"),
    ),
    "merge_lora": Command(
        "litgpt.recipe.merge_lora:MergeLora",
        "litgpt.commands.merge_lora:run",
        "Merge an adapter into its base model.",
        ("checkpoint_dir",),
    ),
    "validate": Command(
        "litgpt.recipe.store_commands:Validate",
        "litgpt.commands.validate:run",
        "Check a model folder: files, config, tokenizer, tensors, memory.",
        ("checkpoint_dir",),
    ),
    "verify": Command(
        "litgpt.recipe.store_commands:Verify",
        "litgpt.commands.verify:run",
        "Compare a model folder with transformers: tensors, logits, tokenizer.",
        ("checkpoint_dir",),
    ),
    "data prepare": Command(
        "litgpt.recipe.data_commands:DataPrepare",
        "litgpt.commands.data_prepare:run",
        "Download and tokenize the data of a run in advance.",
        ("data",),
    ),
    "data inspect": Command(
        "litgpt.recipe.data_commands:DataInspect",
        "litgpt.commands.data_inspect:run",
        "Show the data of a run: counts, and samples as text.",
        ("data",),
    ),
    "tokenizer train": Command(
        "litgpt.recipe.data_commands:TokenizerTrain",
        "litgpt.commands.tokenizer_train:run",
        "Train a tokenizer on text.",
        ("input", "output_dir"),
    ),
    "report": Command(
        "litgpt.recipe.report:Report",
        "litgpt.commands.report:run",
        "Write a self-contained HTML report of a run.",
        ("out_dir",),
    ),
    "schema": Command(
        "litgpt.recipe.schema:Schema",
        "litgpt.commands.schema:run",
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
