"""Format translations as YAML with comments, and the table of options as lines."""

import json
from collections.abc import Iterator
from typing import Any

import yaml

from litgpt.recipe.commands import COMMANDS
from litgpt.recipe.keys import list_settings
from litgpt.recipe.option_table import index_options
from litgpt.recipe.translation import RecipeTranslation

LINE_WIDTH = 1_000_000  # one line for each value, so that its comment stands beside it


def nest_settings(translation: RecipeTranslation) -> tuple[dict[str, Any], dict[str, str]]:
    """Nest dotted keys below their groups and classes, in the order of the recipe.

    Returns:
        The mapping, and the comments by the dotted keys in it, which have `init_args` and `class_path` as parts.
    """
    order, classes = list(list_settings(COMMANDS[translation.command].import_recipe())), translation.list_classes()
    tree: dict[str, Any] = {}
    comments: dict[str, str] = {}

    def rank(key: str) -> tuple[int, bool]:
        return order.index(key.split(".")[0]), key != "data.sources"

    for key in sorted(translation.settings, key=rank):
        value = translation.settings[key]
        top, *parts = key.split(".")
        group = tree
        if top in classes:
            choice = tree.setdefault(top, {"class_path": classes[top], "init_args": {}})
            parts = [top, "init_args", *parts] if parts else [top, "class_path"]
            group = {top: choice}
        else:
            parts = [top, *parts]
        for part in parts[:-1]:
            group = group.setdefault(part, {})
        group[parts[-1]] = value
        if key in translation.comments:
            comments[".".join(parts)] = translation.comments[key]
    return {key: simplify_choice(value) for key, value in tree.items()}, comments


def simplify_choice(value: Any) -> Any:
    """Leave out the settings of a class that has none."""
    has_none = isinstance(value, dict) and value.get("init_args") == {}
    return {"class_path": value["class_path"]} if has_none else value


def format_scalar(value: Any) -> str:
    """Format a value that is no group in one line of YAML."""
    if isinstance(value, str) and "\n" in value:
        return json.dumps(value, ensure_ascii=False)
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=LINE_WIDTH)
    return text.removesuffix("...\n").strip()


def format_tree(tree: dict[str, Any], comments: dict[str, str], prefix: str = "") -> Iterator[str]:
    """Yield the lines of a mapping, with comments by dotted keys."""
    indent = "  " * prefix.count(".")
    for key, value in tree.items():
        comment = f"  # {comments[prefix + key]}" if prefix + key in comments else ""
        if isinstance(value, dict):
            yield f"{indent}{key}:{comment}"
            yield from format_tree(value, comments, f"{prefix}{key}.")
        else:
            yield f"{indent}{key}: {format_scalar(value)}{comment}"


def format_translation(translation: RecipeTranslation) -> str:
    """Format a translation: the command, its YAML with comments, and what the YAML does not say."""
    name = f"# {translation.launch.program} {translation.launch.verb}"
    if translation.no_command:
        return f"{name}: {translation.no_command}\n"
    lines = [f"{name} -> litgpt {translation.command} --config recipe.yaml"]
    lines += format_tree(*nest_settings(translation))
    for title, entries in (
        ("To set", translation.missing),
        ("Nothing to set", translation.unset),
        ("Refused", translation.refused),
        ("Left over", translation.left_over),
    ):
        if entries:
            lines += [f"# {title}:", *(f"#   {' '.join(entry.split())}" for entry in entries)]
    return "\n".join(lines) + "\n"


def list_option_lines() -> Iterator[str]:
    """Yield a line for each name of the table: the name, its state, and its key or the reason."""
    width = max(map(len, index_options()))
    for name, option in index_options().items():
        yield f"{name:{width}}  {option.state:10}  {option.describe()}"
