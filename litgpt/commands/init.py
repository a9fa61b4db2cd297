"""`litgpt init`: a commented recipe to start from."""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from litgpt.errors import UserError
from litgpt.files import CHECKPOINTS, extend_checkpoint_dir, write_text
from litgpt.model.config import Config
from litgpt.model.gpt import GPT
from litgpt.model.registry import has_config
from litgpt.recipe.starting_recipe import (
    Init,
    choose_machine,
    choose_settings,
    format_recipe,
    load_starting_recipes,
)

EXAMPLES = {"task": "finetune", "model": "Qwen/Qwen3-0.6B", "dataset": "chats.jsonl", "gpus": "1"}
"""The answers to empty questions, but for the data; and what errors suggest."""


def ask(settings: Init, key: str, question: str, convert: Callable[[str], Any] = str) -> Init:
    """Return the settings with a key that is not set from an answer on the terminal.

    Raises:
        UserError: without a terminal, or for an answer that is not valid.
    """
    if getattr(settings, key) is not None:
        return settings
    example = EXAMPLES[key]
    missing = UserError(f"{key}: missing; set it, as in --{key} {example}")
    if not sys.stdin.isatty():
        raise missing
    try:
        answer = input(f"{question}: " if key == "dataset" else f"{question} [{example}]: ").strip()
    except EOFError:
        raise missing from None
    if not answer and key == "dataset":
        raise missing
    try:
        return replace(settings, **{key: convert(answer or example)})
    except ValueError:
        raise UserError(f"{key}: {answer} is not valid; use another such as {example}") from None


def find_task(name: str) -> str:
    """Return the name of a task; ValueError if there is none."""
    return list(tasks := load_starting_recipes())[list(tasks).index(name)]


def complete_settings(settings: Init) -> Init:
    """Ask for the settings that are missing."""
    starts = load_starting_recipes()
    settings = ask(settings, "task", f"Task ({', '.join(starts)})", find_task)
    settings = ask(settings, "model", "Model (a name of `litgpt pretrain list`, org/name or a folder)")
    settings = ask(settings, "dataset", f"Data ({starts[str(settings.task)]['data']})")
    return ask(settings, "gpus", "Number of GPUs (0 to train on the CPU)", int)


def find_model(settings: Init) -> tuple[Config, dict[str, Any], str]:
    """Find the model of a task.

    Returns:
        Its configuration, the keys of the recipe that select it, and the command that downloads what they need.

    Raises:
        UserError: with names that are close, if it is neither known nor a folder.
    """
    folder = extend_checkpoint_dir(Path(str(settings.model)))
    if settings.task != "pretrain" and has_config(folder):
        return Config.from_checkpoint(folder), {"checkpoint_dir": str(folder)}, ""
    config = Config.from_name(str(settings.model))
    repository = f"{config.hf_config['org']}/{config.hf_config['name']}" if "org" in config.hf_config else ""
    if settings.task != "pretrain":
        return config, {"checkpoint_dir": repository}, f"litgpt download {repository}"
    if not repository:
        return config, {"model_name": config.name, "tokenizer": {"vocab_size": config.vocab_size}}, ""
    keys = {"model_name": config.name, "tokenizer_dir": str(CHECKPOINTS / repository)}
    return config, keys, f"litgpt download {repository} --tokenizer_only true"


def run(settings: Init) -> None:
    """Write the recipe and print the commands that use it."""
    if settings.output.exists():
        raise UserError(f"output: {settings.output} exists; set another path")
    settings = complete_settings(settings)
    config, keys, download = find_model(settings)
    parameters = sum(parameter.numel() for parameter in GPT.on_meta(config).parameters())
    machine, memory = choose_machine(settings, parameters)
    start = load_starting_recipes()[str(settings.task)]
    summary = start["summary"].format(model=config.name, data=settings.dataset)
    where = f"{settings.gpus} x {settings.gpu_memory:g} GB of GPU memory" if settings.gpus else "the CPU"
    train = f"litgpt {settings.task} --config {settings.output}"
    lines = [f"{summary}; {where}.", memory, *filter(None, (download, train))]
    write_text(settings.output, format_recipe(str(settings.task), choose_settings(settings, keys, machine), lines))
    print("\n".join([f"{settings.output} is written. {memory}", *filter(None, (download, train))]))
