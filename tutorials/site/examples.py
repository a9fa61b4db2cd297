"""An example value for every key: one that the recipes and pages use, or else one that its type allows."""

import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml

from litgpt.recipe.bounds import find_limits
from litgpt.recipe.commands import COMMANDS
from litgpt.recipe.config_hub import list_hub_names
from litgpt.recipe.help_text import Entry
from litgpt.recipe.keys import REQUIRED, list_types

PAGES = Path(__file__).parents[1]
FLAG = re.compile(r"--([a-z][\w.]*)[ =](?=[^\s-])('[^']*'|\"[^\"]*\"|[^\s`)]+)")
FENCE = re.compile(r"^```yaml\n(.*?)^```$", re.MULTILINE | re.DOTALL)
YAML_TYPES = {int: (int,), float: (int, float), bool: (bool,), dict: (dict,), str: (str,), Path: (str,)}
"""The types that YAML reads values of a type as."""
NUMBER = re.compile(r"\d+(\.\d*)?e[+-]?\d+")


def list_values(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted keys of a recipe and their values; those of a class without `init_args`."""
    for name, value in tree.items():
        key = prefix.removesuffix(".") if name == "class_path" else f"{prefix}{name}"
        if name == "init_args" and isinstance(value, dict):
            yield from list_values(value, prefix)
        else:
            yield key, value
            if isinstance(value, dict):
                yield from list_values(value, f"{key}.")


def read_yaml(text: str) -> dict[str, Any]:
    """Read a block of YAML; empty if it is no mapping, or only a part of one."""
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError:
        return {}
    return tree if isinstance(tree, dict) and all(isinstance(name, str) for name in tree) else {}


@cache
def collect_values() -> dict[str, list[Any]]:
    """Collect the values that keys have in the recipes, in the examples of commands and in the pages, in this order."""
    pages = [path.read_text(encoding="utf-8") for path in sorted(PAGES.glob("*.md"))]
    recipes = [path.read_text(encoding="utf-8") for path in list_hub_names().values()]
    blocks = [block for page in pages for block in FENCE.findall(page)]
    values: dict[str, list[Any]] = {}
    for text in (*recipes, *blocks):
        for key, value in list_values(read_yaml(text)):
            values.setdefault(key, []).append(value)
    for text in (*(command.example for command in COMMANDS.values()), *pages):
        for key, value in FLAG.findall(text):
            values.setdefault(key, []).append(read_flag(value))
    return values


def read_flag(text: str) -> Any:
    """Read the value of a flag, with numbers such as 1e8 as such; None for one that is a variable or a part of one."""
    if set("$`<\\") & set(text):
        return None
    try:
        return float(text) if NUMBER.fullmatch(text) else yaml.safe_load(text)
    except yaml.YAMLError:
        return None


def accepts(hint: Any, value: Any) -> bool:
    """Whether a value of YAML is of a type that a key accepts, and within its limits."""
    limits = find_limits(hint)
    if limits and isinstance(value, int | float) and not limits.low <= value <= limits.high:
        return False
    return any(is_of_type(value, kind) for kind in list_types(hint))


def is_of_type(value: Any, kind: Any) -> bool:
    """Whether a value of YAML is of one of the types of a key."""
    origin = get_origin(kind) or kind
    if origin is Literal:
        return any(value == choice and type(value) is type(choice) for choice in get_args(kind))
    if origin in (list, tuple):
        return isinstance(value, list) and all(accepts(item, part) for item in get_args(kind)[:1] for part in value)
    return type(value) in YAML_TYPES.get(origin, ()) and value != ""


def build_value(hint: Any, default: Any, name: str) -> Any:
    """Build a value that a type allows, another one than the default where that is possible."""
    limits = find_limits(hint)
    for kind in list_types(hint):
        if get_origin(kind) is Literal:
            return next((choice for choice in get_args(kind) if choice != default), get_args(kind)[0])
        if kind is bool:
            return default is not True
        if kind in (int, float):
            low, high = (limits.low, limits.high) if limits else (0, 1)
            middle = max(low, min(high, 1)) if kind is int else max(low, min(high, 0.5))
            return kind(middle)
        if kind is Path:
            return f"path/to/{name}"
        if kind is str:
            return name
        if get_origin(kind) in (list, tuple):
            return [build_value(get_args(kind)[0], None, name)]
        if get_origin(kind) is dict or kind is dict:
            return {}
    return None


def find_example(entry: Entry) -> Any:
    """Find an example value of a key: of the recipes and pages, its default, or one that its type allows."""
    if isinstance(entry.default, Path):
        return str(entry.default)
    used = collect_values().get(entry.key, ())
    if int in list_types(entry.hint):
        used = [int(value) if isinstance(value, float) and value.is_integer() else value for value in used]
    known = [value for value in used if accepts(entry.hint, value)]
    changed = [value for value in known if value != entry.default]
    if changed or known:
        return (changed or known)[0]
    if entry.default not in (None, REQUIRED, "", ()) and not isinstance(entry.default, bool):
        plain = list(entry.default) if isinstance(entry.default, tuple) else entry.default
        if accepts(entry.hint, plain) and not any(get_origin(kind) is Literal for kind in list_types(entry.hint)):
            return plain
    return build_value(entry.hint, entry.default, entry.key.rpartition(".")[2])


def write_example(key: str, value: Any, class_path: str = "") -> str:
    """Write a key and its value as one line of a recipe.

    Args:
        class_path: the class whose key it is, which its first part selects; empty for a key of the recipe itself.
    """
    first, *rest = key.split(".")
    for name in reversed(rest):
        value = {name: value}
    tree = {first: {"class_path": class_path, "init_args": value} if class_path else value}
    text = yaml.safe_dump(tree, default_flow_style=True, sort_keys=False, width=10_000, allow_unicode=True)
    return text.strip()[1:-1]
