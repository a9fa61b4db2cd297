"""The output of `--help`: the keys that a first run needs, the groups of all others, and the keys of each group."""

import inspect
import re
import textwrap
from collections.abc import Iterator
from dataclasses import is_dataclass
from functools import cache
from pathlib import Path
from types import NoneType
from typing import Any, Literal, NamedTuple, get_args, get_origin

from docstring_parser import parse_from_object

from litgpt.errors import UserError
from litgpt.recipe.choices import CLASS_PATHS, import_class, resolve_class_path
from litgpt.recipe.columns import WIDTH, format_columns
from litgpt.recipe.commands import COMMANDS, DRY_RUN
from litgpt.recipe.keys import REQUIRED, find_choice_base, find_group, list_settings, list_types

TYPE_NAMES: dict[Any, str] = {
    str: "text",
    bool: "true | false",
    Path: "path",
    NoneType: "null",
    float: "number",
    int: "integer",
}
LEFT = 28  # maximum width of a key beside its description
ALL_KEYS = 16  # commands with at most this many keys list all of them
ROOT = "general"  # the keys that are in no group


class Entry(NamedTuple):
    """A key of a recipe, or of a class that it names.

    Attributes:
        key: the key, with dots.
        hint: its type.
        default: its default, or REQUIRED.
        text: its description.
    """

    key: str
    hint: Any
    default: Any
    text: str


@cache
def read_descriptions(cls: type) -> dict[str, str]:
    """Read the descriptions of the settings of a class from its docstrings and those of its bases."""
    descriptions: dict[str, str] = {}
    for base in reversed(cls.__mro__[:-1]):
        try:
            parameters = parse_from_object(base).params
        except (OSError, TypeError, SyntaxError):  # a class without source, such as one of C
            continue
        descriptions |= {item.arg_name: " ".join((item.description or "").split()) for item in parameters}
    return descriptions


def list_entries(cls: type, prefix: str = "", values: Any = None) -> Iterator[Entry]:
    """Yield the keys of a class, and those of its groups.

    Args:
        prefix: the dotted key of the class, with a dot at its end.
        values: an object with the defaults; None for those of the class.
    """
    descriptions = read_descriptions(cls)
    for name, (hint, default) in list_settings(cls).items():
        value = getattr(values, name, default)
        if group := find_group(hint):
            if prefix:  # a group of the recipe itself has a heading
                yield Entry(prefix + name, hint, value, descriptions.get(name, ""))
            yield from list_entries(group, f"{prefix}{name}.", None if value is REQUIRED else value)
            continue
        yield Entry(prefix + name, hint, value, descriptions.get(name, ""))
        if find_choice_base(hint) and value not in (None, REQUIRED):
            yield from list_entries(type(value), f"{prefix}{name}.", value)


def list_groups(recipe: type) -> dict[str, list[Entry]]:
    """List the keys of a recipe by group; those without a group come first."""
    groups: dict[str, list[Entry]] = {ROOT: []}
    for entry in list_entries(recipe):
        group, dot, _ = entry.key.partition(".")
        groups.setdefault(group if dot else ROOT, []).append(entry)
    return groups


def name_types(hint: Any) -> str:
    """Name the types of a setting in a few words."""
    if base := find_choice_base(hint):
        return f"{base.__name__} class"
    names = []
    for kind in list_types(hint):
        if get_origin(kind) is Literal:
            names += [str(choice) for choice in get_args(kind)]
        elif get_origin(kind) in (list, tuple) or kind is list:
            names.append("list")
        elif get_origin(kind) is dict or kind is dict or is_dataclass(kind):
            names.append("mapping")
        elif kind is not Any:
            names.append(TYPE_NAMES.get(kind) or str(getattr(kind, "__name__", kind)))
    return " | ".join(dict.fromkeys(names))


def format_default(entry: Entry) -> str:
    """Return the type and the default of a key, in brackets."""
    types, value = name_types(entry.hint), entry.default
    if value is REQUIRED:
        shown = "required"
    elif find_choice_base(entry.hint) and value is not None:
        shown = type(value).__name__
    elif value is None or isinstance(value, bool):
        shown = str(value).replace("None", "null").lower()
    elif isinstance(value, float):
        shown = f"{value:.10g}"
    else:
        shown = str(list(value) if isinstance(value, tuple) else value) or "empty"
    shown = shown if value is REQUIRED else f"default {shown}"
    return f"[{types}; {shown}]" if types else f"[{shown}]"


def format_entries(entries: list[Entry], positionals: tuple[str, ...] = ()) -> list[str]:
    """Format keys as two columns, in the form in which they are typed."""
    rows = []
    for entry in entries:
        typed = entry.key.upper() if entry.key in positionals else f"--{entry.key}"
        text = f"{entry.text.rstrip('.')}." if entry.text else ""
        rows.append((typed, f"{text} {format_default(entry)}".strip()))
    return format_columns(rows, LEFT)


def print_topic(recipe: type, topic: str, name: str = "") -> None:
    """Print the keys of a group; for the key of a class, the names of the classes, or the keys of the class `name`.

    For any other key, its description is printed.

    Raises:
        UserError: if the topic is none of these, or there is no such class.
    """
    groups, settings = list_groups(recipe), list_settings(recipe)
    if base := find_choice_base(settings.get(topic, (None, None))[0]):
        if topic in groups and not name:  # of the default class
            print("\n".join([f"{topic}:", *format_entries(groups[topic]), "", f"classes of {topic}:"]))
        print("\n".join(format_choice(base, topic, name)))
    elif topic in groups:
        print("\n".join([f"{topic}:", *format_entries(groups[topic])]))
    elif entry := next((entry for entries in groups.values() for entry in entries if entry.key == topic), None):
        print("\n".join(format_entries([entry])))
    else:
        choices = [key for key, (hint, _) in settings.items() if find_choice_base(hint)]
        raise UserError(
            f"{topic} is not a group of keys; use --help all, or {', '.join(dict.fromkeys([*groups, *choices]))}"
        )


def format_choice(base: type, key: str, name: str) -> list[str]:
    """Format the names of the classes that a key accepts, or the keys of one of them."""
    if name:
        cls = import_class(resolve_class_path(base, name, key, trusted=True), key)
        return [*textwrap.wrap(get_summary(cls), WIDTH), "", *format_entries(list(list_entries(cls, f"{key}.")))]
    table = {short: path for short, path in CLASS_PATHS[base].items() if "." not in short}
    return format_columns(((short, get_summary(import_class(path, key))) for short, path in table.items()), LEFT)


def get_summary(cls: type) -> str:
    """Return the first paragraph of the docstring of a class, in one line."""
    return " ".join((inspect.getdoc(cls) or "").partition("\n\n")[0].split())


def format_first_keys(name: str, recipe: type) -> list[str]:
    """Format the keys that a first run of a command needs, and the names of the others."""
    command, groups = COMMANDS[name], list_groups(recipe)
    keys = {entry.key: entry for entries in groups.values() for entry in entries}
    choices = [entry.key for entry in keys.values() if find_choice_base(entry.hint)]
    first = keys if len(keys) <= ALL_KEYS else [*command.positionals, *command.first]
    lines = [
        "keys:" if first is keys else "keys for a first run:",
        *format_entries([keys[key] for key in first], command.positionals),
        "",
    ]
    rest = {group: [entry.key for entry in entries if entry.key not in first] for group, entries in groups.items()}
    footer = "--dry_run prints the plan of the run on this machine, and ends. " if DRY_RUN in command.switches else ""
    if any(rest.values()):
        parts = {group: ", ".join(key.removeprefix(f"{group}.") for key in others) for group, others in rest.items()}
        lines += ["more keys, by group:", *format_columns([pair for pair in parts.items() if pair[1]], LEFT), ""]
        footer += "--help GROUP describes the keys of a group, --help all all keys. "
    for key in choices:
        footer += f"--{key}.help lists the classes of {key}, --{key}.help CLASS the keys of one. "
    return [*lines, *textwrap.wrap(footer, WIDTH, break_on_hyphens=False)]


def format_command_line(text: str) -> str:
    """Format an example over several lines, each but the last with a backslash at its end."""
    joined = re.sub(r"(--\S+) ", "\\1\0", text)  # a flag and its value stay on one line
    options: dict[str, Any] = {"break_on_hyphens": False, "break_long_words": False}
    lines = textwrap.wrap(joined, WIDTH - 2, initial_indent="  ", subsequent_indent="    ", **options)
    return " \\\n".join(lines).replace("\0", " ")


def print_help(name: str, topic: str) -> None:
    """Print the help of a command.

    Args:
        topic: a group of keys; `all` for all keys; empty for those that a first run needs, and the names of the others.

    Raises:
        UserError: if there is no such group.
    """
    command, recipe = COMMANDS[name], COMMANDS[name].import_recipe()
    if topic not in ("", "all"):
        print_topic(recipe, topic)
        return
    required = {key: default is REQUIRED for key, (_, default) in list_settings(recipe).items()}
    words = [key.upper() if required[key] else f"[{key.upper()}]" for key in command.positionals]
    if command.repeats:
        words[-1] += " ..."
    usage = " ".join(["usage: litgpt", name, *words, "[--KEY VALUE ...] [--config FILE-or-NAME]"])
    print("\n".join(textwrap.wrap(usage, WIDTH, subsequent_indent=" " * 14, break_on_hyphens=False)), end="\n\n")
    print("\n".join([*textwrap.wrap(get_summary(recipe), WIDTH), "", "example:"]))
    print(format_command_line(command.example), end="\n\n")
    if topic:
        for group, entries in list_groups(recipe).items():
            print("\n".join([f"{group}:", *format_entries(entries, command.positionals), ""]))
    else:
        print("\n".join(format_first_keys(name, recipe)))
