"""The pages of the reference, as Markdown: commands with all their keys, and the classes that keys select."""

import re
import textwrap
from collections.abc import Iterator

from litgpt.recipe.choices import CLASS_PATHS, DEFAULT_CLASSES, find_default_class, import_class
from litgpt.recipe.commands import COMMANDS
from litgpt.recipe.data import DataModule
from litgpt.recipe.help_text import (
    ROOT,
    Entry,
    format_command_line,
    format_default,
    get_summary,
    list_entries,
    list_groups,
    name_types,
)
from litgpt.recipe.keys import CHOICE_BASES, describe_type, find_choice_base, find_group, list_settings
from litgpt.recipe.optimizer import OPTIMIZER_ALIASES, Optimizer
from litgpt.recipe.tuner import Tuner
from tutorials.site.examples import find_example, write_example

CHOICE_PAGES: dict[type, tuple[str, str, str]] = {
    DataModule: ("data", "Data modules", "What `data` selects."),
    Optimizer: ("optimizers", "Optimizers", "What `optimizer` selects; any other class of `torch.optim` by its name."),
    Tuner: ("tuners", "Tuners", "What `tuner` selects in `litgpt finetune` and `litgpt align`."),
}
"""File name, title and first sentence of the page of each kind of class."""
CODE = re.compile(r"(`[^`]*`)")


def escape_text(text: str) -> str:
    """Escape what Markdown and HTML read as markup in a sentence, outside of its code."""
    parts = CODE.split(text)
    parts[::2] = [re.sub(r"([<>*_\[\]|])", r"\\\1", part).replace(r"\<", "&lt;") for part in parts[::2]]
    return "".join(parts)


def name_command_page(name: str) -> str:
    """Return the path of the page of a command."""
    return f"reference/commands/{name.replace(' ', '-')}.md"


def describe_values(entry: Entry, folder: str) -> str:
    """Describe which values a key accepts, with its limits; a class by a link to the page with all of them.

    Args:
        folder: the path of the reference from the page.
    """
    if base := find_choice_base(entry.hint):
        name, title, _ = CHOICE_PAGES[base]
        return f"one of the [{title.lower()}]({folder}{name}.md)"
    if find_group(entry.hint):
        return "a group of keys, which follow"
    return f"{escape_text(describe_type(entry.hint))}" if name_types(entry.hint) else "any value"


def write_entry(entry: Entry, example: str, folder: str, anchor: str = "") -> Iterator[str]:
    """Write a key: its sentence, the values that it accepts, its default and an example.

    Args:
        example: a line of a recipe.
        folder: the path of the reference from the page.
        anchor: what the anchor of the key begins with.
    """
    yield f"### `{entry.key}` {{ #{anchor}{entry.key} }}\n"
    yield f"{escape_text(entry.text.rstrip('.'))}.\n"
    default = format_default(entry).strip("[]").rpartition("; ")[2].removeprefix("default ")
    shown = f"default `{default}`" if default != "required" else "**required**"
    yield f"Value: {describe_values(entry, folder)}; {shown}.\n"
    if not find_group(entry.hint):
        yield f"```yaml\n{example}\n```\n"


def write_key_example(recipe: type, entry: Entry) -> str:
    """Write an example of a key of a recipe; of one that selects a class, the class that is used by default."""
    if base := find_choice_base(entry.hint):
        return write_example(entry.key, find_default_class(recipe, entry.key) or next(iter(CLASS_PATHS[base])))
    first, dot, _ = entry.key.partition(".")
    hint, default = list_settings(recipe)[first]
    class_path = type(default).__name__ if dot and find_choice_base(hint) else ""
    return write_example(entry.key, find_example(entry), class_path)


def find_same_command(name: str) -> str | None:
    """Return the first command with the same recipe and function, if that is another one."""
    row = COMMANDS[name]
    first = next(key for key, other in COMMANDS.items() if (other.recipe, other.module) == (row.recipe, row.module))
    return None if first == name else first


def write_command_page(name: str) -> str:
    """Write the page of a command, with every key of its recipe."""
    command = COMMANDS[name]
    example = textwrap.dedent(format_command_line(command.example))
    lines = [f"# litgpt {name}\n", f"{escape_text(command.help)}\n", f"```sh\n{example}\n```\n"]
    if command.positionals:
        keys = ", ".join(f"`{key}`" for key in command.positionals)
        lines.append(f"Without their names, in this order: {keys}.\n")
    if other := find_same_command(name):
        page = name_command_page(other).rpartition("/")[2]
        return "\n".join([*lines, f"It is another name of [litgpt {other}]({page}), where its keys are described.\n"])
    recipe = command.import_recipe()
    settings = list_settings(recipe)
    for group, entries in list_groups(recipe).items():
        title = "General keys" if group == ROOT else f"`{group}`"
        if not entries:
            continue
        lines.append(f"## {title} {{ #group-{group} }}\n")
        if group in settings and (cls := find_group(settings[group][0])):
            lines.append(f"{escape_text(get_summary(cls))}\n")
        elif group in settings:
            hint, default = settings[group]
            page, title, _ = CHOICE_PAGES[find_choice_base(hint)]  # type: ignore[index]
            lines.append(f"The keys of {type(default).__name__}; [{title}](../{page}.md) has those of others.\n")
        for entry in entries:
            lines += write_entry(entry, write_key_example(recipe, entry), "../")
    return "\n".join(lines)


def write_choice_page(base: type, key: str) -> str:
    """Write the page of the classes that a key selects, with the keys of each."""
    _, title, sentence = CHOICE_PAGES[base]
    lines = [f"# {title}\n", f"{sentence}\n"]
    for name, path in CLASS_PATHS[base].items():
        if "." in name or name in OPTIMIZER_ALIASES:
            continue
        cls = import_class(path, key)
        aliases = [alias for alias, same in OPTIMIZER_ALIASES.items() if base is Optimizer and same == name]
        lines += [f"## {name}\n", f"{escape_text(get_summary(cls))}\n"]
        if name == DEFAULT_CLASSES.get(base):
            lines.append("This is the default.\n")
        if aliases:
            lines.append(f"Other names: {', '.join(f'`{alias}`' for alias in aliases)}.\n")
        lines.append(f"```yaml\n{key}: {{class_path: {name}}}\n```\n")
        for entry in list_entries(cls, f"{key}."):
            example = write_example(entry.key, find_example(entry), name)
            lines += write_entry(entry, example, "", f"{name}.")
    return "\n".join(lines)


def write_command_list() -> str:
    """Write the page that lists all commands."""
    rows = [
        f"| [litgpt {name}]({name_command_page(name).removeprefix('reference/')}) | {escape_text(command.help)} |"
        for name, command in COMMANDS.items()
    ]
    return "\n".join(["# Commands\n", "| command | description |", "|---|---|", *rows, ""])


def build_reference_pages() -> dict[str, str]:
    """Build the pages of commands and classes: their Markdown by path."""
    pages = {"reference/index.md": write_command_list()}
    pages |= {name_command_page(name): write_command_page(name) for name in COMMANDS}
    for base in CHOICE_BASES:
        key = {DataModule: "data", Optimizer: "optimizer", Tuner: "tuner"}[base]
        pages[f"reference/{CHOICE_PAGES[base][0]}.md"] = write_choice_page(base, key)
    return pages
