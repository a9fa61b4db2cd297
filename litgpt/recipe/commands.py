"""The table of commands: what each is called, and where its recipe and its code live."""

import difflib
import importlib
from collections.abc import Sequence
from typing import Any, NamedTuple

from litgpt.errors import UserError


class Command(NamedTuple):
    """Where a command lives, what it says of itself, and which keys it takes without their names."""

    recipe: str
    run: str
    help: str
    positionals: tuple[str, ...] = ()


COMMANDS = {
    "pretrain": Command(
        "litgpt.recipe.pretrain:Pretrain",
        "litgpt.commands.pretrain:run",
        "Pretrain a model on text, from scratch or from the weights of another.",
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
        "The same as finetune.",
        ("checkpoint_dir",),
    ),
    "finetune_full": Command(
        "litgpt.recipe.finetune:FinetuneFull",
        "litgpt.commands.finetune:run",
        "Finetune the weights of a model, all or some of them.",
        ("checkpoint_dir",),
    ),
    "finetune_adapter": Command(
        "litgpt.recipe.finetune:FinetuneAdapter",
        "litgpt.commands.finetune:run",
        "Finetune a model through trained prompts (LLaMA-Adapter).",
        ("checkpoint_dir",),
    ),
    "finetune_adapter_v2": Command(
        "litgpt.recipe.finetune:FinetuneAdapterV2",
        "litgpt.commands.finetune:run",
        "The same, with scales and shifts of all linear layers.",
        ("checkpoint_dir",),
    ),
    "generate": Command(
        "litgpt.recipe.generate:Generate",
        "litgpt.commands.generate:run",
        "Write text with a model.",
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
        "Make a model folder of .bin, lit_model.pth, GGUF files or a training checkpoint.",
        ("checkpoint_dir",),
    ),
    "convert_from_litgpt": Command(
        "litgpt.recipe.store_commands:ConvertFromLitgpt",
        "litgpt.commands.convert_from_litgpt:run",
        "Write a model for other programs: a Hugging Face folder, or LitGPT's files.",
        ("checkpoint_dir", "output_dir"),
    ),
    "convert_pretrained_checkpoint": Command(
        "litgpt.recipe.store_commands:ConvertPretrainedCheckpoint",
        "litgpt.commands.convert_pretrained_checkpoint:run",
        "Turn a training checkpoint into a clean model folder.",
        ("checkpoint_dir", "output_dir"),
    ),
    "merge_lora": Command(
        "litgpt.recipe.merge_lora:MergeLora",
        "litgpt.commands.merge_lora:run",
        "Fold an adapter into the model that it was trained beside.",
        ("checkpoint_dir",),
    ),
    "validate": Command(
        "litgpt.recipe.store_commands:Validate",
        "litgpt.commands.validate:run",
        "Check that a model folder can be used: files, shape, tokenizer, tensors, memory.",
        ("checkpoint_dir",),
    ),
    "verify": Command(
        "litgpt.recipe.store_commands:Verify",
        "litgpt.commands.verify:run",
        "Hold a model folder against transformers: tensors, logits, tokenizer.",
        ("checkpoint_dir",),
    ),
    "data prepare": Command(
        "litgpt.recipe.data_commands:DataPrepare",
        "litgpt.commands.data_prepare:run",
        "Download and tokenize a run's data ahead of it.",
        ("data",),
    ),
    "data inspect": Command(
        "litgpt.recipe.data_commands:DataInspect",
        "litgpt.commands.data_inspect:run",
        "Show what a run would read: counts, and samples as text.",
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
        "Write one HTML page about a run, readable without network.",
        ("out_dir",),
    ),
    "schema": Command(
        "litgpt.recipe.schema:Schema",
        "litgpt.commands.schema:run",
        "Print the JSON Schema of a command's recipe, or of all, for editors.",
        ("command", "subcommand"),
    ),
}


def import_object(path: str) -> Any:
    """The object at `module:name`."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def find_command(argv: Sequence[str]) -> tuple[str, list[str]]:
    """The command that a line begins with, and the rest of the line."""
    for words in (2, 1):
        if (name := " ".join(argv[:words])) in COMMANDS:
            return name, list(argv[words:])
    given = " ".join(word for word in argv[:2] if not word.startswith("-"))
    below = [name for name in COMMANDS if name.startswith(f"{argv[0]} ")]
    near = below or difflib.get_close_matches(given, COMMANDS, n=1) or difflib.get_close_matches(argv[0], COMMANDS, n=1)
    hint = f"did you mean {' or '.join(near)}?" if near else f"the commands are {', '.join(COMMANDS)}"
    raise UserError(f"{given or argv[0]!r} is not a command; {hint}")
