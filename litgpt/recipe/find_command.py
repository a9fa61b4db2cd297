"""Find the command that a command line begins with, or the ones that are probably meant."""

import difflib
from collections.abc import Sequence
from pathlib import Path

from litgpt.errors import UserError
from litgpt.recipe.commands import COMMANDS

FIELD_COMMANDS = {
    "pt": ("pretrain",),
    "train": ("pretrain", "finetune"),
    "sft": ("finetune",),
    "rlhf": ("align",),
    "megatron": ("explain",),
    "swift": ("explain",),
    "orpo": ("align",),
    "simpo": ("align",),
    "cpo": ("align",),
    "lora": ("finetune_lora",),
    "infer": ("generate",),
    "eval": ("evaluate",),
    "inference": ("generate",),
    "sample": ("generate",),
    "export": ("convert_from_litgpt", "merge_lora"),
    "convert": ("convert_to_litgpt", "convert_from_litgpt"),
    "merge": ("merge_lora",),
    "merge-lora": ("merge_lora",),
    "prepare": ("data prepare",),
    "tokenize": ("data prepare",),
}
"""Commands by the names that other projects have for them."""


def find_command(argv: Sequence[str]) -> tuple[str, list[str]]:
    """Return the command that a command line begins with, and the remaining arguments."""
    if joined := join_command(argv):
        raise UserError(f"{' '.join(argv[: joined.count('_') + 1])!r} is not a command; did you mean {joined}?")
    for words in (2, 1):
        if (name := " ".join(argv[:words])) in COMMANDS:
            return name, list(argv[words:])
    raise UserError(f"{argv[0]!r} is not a command; {find_command_hint(argv)}")


def find_command_hint(argv: Sequence[str]) -> str:
    """Return the end of the error for an unknown command: the commands that are probably meant, or all."""
    name, words = argv[0], " ".join(word for word in argv[:2] if not word.startswith("-"))
    near = (
        [other for other in COMMANDS if other.startswith(f"{name} ")]
        or FIELD_COMMANDS.get(name)
        or difflib.get_close_matches(words, COMMANDS, n=1)
        or difflib.get_close_matches(name, COMMANDS, n=1)
    )
    return f"did you mean {' or '.join(near)}?" if near else f"the commands are {', '.join(COMMANDS)}"


def join_command(argv: Sequence[str]) -> str | None:
    """Return the command that the first words name if they are joined, as finetune_lora; None if the next is a path."""
    joined = ("_".join(argv[:words]) for words in (3, 2) if len(argv) >= words)
    return next((name for name in joined if name in COMMANDS and not Path(argv[1]).exists()), None)
