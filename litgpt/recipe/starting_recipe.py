"""The settings of `litgpt init`, and the commented recipe that it writes."""

import textwrap
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from annotated_types import Ge, Le

from litgpt.errors import UserError
from litgpt.mappings import drop_nulls, merge_mappings
from litgpt.recipe.bounds import Position, check_numbers
from litgpt.recipe.build import build_recipe, merge_settings
from litgpt.recipe.commands import COMMANDS
from litgpt.recipe.help_text import list_entries

BILLION = 1e9  # parameters, and bytes of a GB
USABLE = 0.8  # of the memory of a GPU for weights, gradients and moments; the rest is for activations
CROWDED = 0.4  # of that memory, from which activations are recomputed
COMMENT_WIDTH = 110
GPUMemory = Annotated[float, Ge(1.0), Le(10_000.0)]


@dataclass(frozen=True)
class Init:
    """Write a commented recipe to start from, for a task, a model and a machine; what is missing is asked for."""

    output: Path = Path("recipe.yaml")
    """Path of the recipe, which must not exist."""
    task: Literal["pretrain", "finetune", "finetune_full", "dpo", "kto", "rm"] | None = None
    """The command of the recipe; null asks for it on a terminal, as for the keys below."""
    model: str | None = None
    """Name of a known model, as `litgpt pretrain list` prints it or as org/name; or the folder of a model."""
    dataset: str | None = None
    """Path of the data: a folder of text for pretraining, else a file of rows or the name of a data set on the hub."""
    gpus: Position | None = None
    """Number of GPUs of the machine; 0 for training on the CPU."""
    gpu_memory: GPUMemory = 80.0
    """Memory of each GPU, in GB."""

    def __post_init__(self) -> None:
        check_numbers(self)


@cache
def load_starting_recipes() -> dict[str, dict[str, Any]]:
    """Load the table of starting recipes by command."""
    return yaml.safe_load((files("litgpt.recipe") / "starting_recipes.yaml").read_text(encoding="utf-8"))


def replace_path(value: Any, data: str) -> Any:
    """Replace {data} by the path of the data, in nested settings."""
    if isinstance(value, dict):
        return {key: replace_path(item, data) for key, item in value.items()}
    if isinstance(value, list):
        return [replace_path(item, data) for item in value]
    return data if value == "{data}" else value


def choose_machine(settings: Init, parameters: int) -> tuple[dict[str, Any], str]:
    """Choose precision, devices and what saves memory, for a model with this number of parameters.

    Returns:
        The settings, and a line with the memory that they take.

    Raises:
        UserError: if the GPUs are too small, with the number that would do.
    """
    if not settings.gpus:
        return {"precision": "32-true", "devices": 1}, "The memory of a CPU is not checked."
    options = load_starting_recipes()[str(settings.task)]["bytes"]
    share, memory = parameters / settings.gpus / BILLION, settings.gpu_memory
    name = next((name for name, size in options.items() if size * share <= USABLE * memory), None)
    if name is None:
        needed = -(-min(options.values()) * parameters // (BILLION * USABLE * memory))
        raise UserError(
            f"gpus: {settings.gpus} of {memory:g} GB are too small for {parameters / 1e9:.1f} billion parameters with "
            f"{settings.task}; set gpus: {needed:.0f}, or a smaller model"
        )
    is_precision = name.startswith("bf16")
    chosen: dict[str, Any] = {"precision": name if is_precision else "bf16-true", "devices": settings.gpus}
    if not is_precision:
        chosen["quantize"] = name
    if options[name] * share > CROWDED * memory:
        chosen["recompute"] = {"granularity": "full"}
    size = f"{parameters / 1e9:.2f} billion parameters x {options[name]:g} bytes"
    over = f" / {settings.gpus} GPUs" if settings.gpus > 1 else ""
    return chosen, f"{size}{over} = {options[name] * share:.1f} GB of {memory:g} GB, without activations."


def choose_settings(settings: Init, model: dict[str, Any], machine: dict[str, Any]) -> dict[str, Any]:
    """Choose the settings of the recipe, in the order of its file.

    Args:
        model: the keys of the model and its tokenizer.
        machine: the keys that `choose_machine` returns.
    """
    start = load_starting_recipes()[str(settings.task)]
    chosen = replace_path(start["settings"], str(settings.dataset))
    if not settings.gpus:
        chosen = merge_mappings(chosen, start["cpu"])
    train = chosen["train"]
    step = train["micro_batch_size"] * max(1, settings.gpus or 0)  # samples that all GPUs compute at a time
    train["global_batch_size"] = -(-train["global_batch_size"] // step) * step
    return model | {"out_dir": f"out/{settings.task}"} | machine | drop_nulls(chosen) | {"logger_name": "csv"}


def format_recipe(command: str, tree: dict[str, Any], head: list[str]) -> str:
    """Format a recipe as YAML with the description of each key above it, after a check that the command accepts it.

    Args:
        head: the lines of the comment at its start.
    """
    recipe = COMMANDS[command].import_recipe()
    settings = build_recipe(recipe, merge_settings(recipe, {}, tree, trusted=True))
    texts = {entry.key: entry.text for entry in list_entries(recipe, values=settings)}
    return "\n".join([*(f"# {line}" for line in head), "", *format_keys(tree, texts), ""])


def format_keys(tree: dict[str, Any], texts: dict[str, str], prefix: str = "", indent: str = "") -> list[str]:
    """Format the keys of a mapping and of its groups, with their descriptions.

    Args:
        texts: the descriptions by dotted key.
        prefix: the dotted key of the mapping, with a dot at its end.
        indent: spaces before each line.
    """
    lines = []
    for key, value in tree.items():
        if key == "class_path":  # the class of its group, whose arguments have the keys of the group
            lines.append(f"{indent}class_path: {value}")
        elif key == "init_args":
            lines += [f"{indent}init_args:", *format_keys(value, texts, prefix, f"{indent}  ")]
        else:
            text = texts.get(prefix + key, "")
            comment = f"{indent}# "
            lines += textwrap.wrap(
                text, COMMENT_WIDTH, initial_indent=comment, subsequent_indent=comment, break_on_hyphens=False
            )
            if isinstance(value, dict) and prefix == "":
                lines += [f"{indent}{key}:", *format_keys(value, texts, f"{key}.", f"{indent}  ")]
            else:
                flow = yaml.safe_dump(value, default_flow_style=True, width=10_000, allow_unicode=True)
                lines.append(f"{indent}{key}: {flow.splitlines()[0]}")  # without "...", the end of a scalar
    return lines
