"""The form of a new run: its fields, from the JSON Schema of a command, and the recipe that its texts are."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from litgpt.errors import UserError
from litgpt.recipe import build
from litgpt.recipe.commands import COMMANDS, import_object
from litgpt.recipe.help_text import list_entries
from litgpt.recipe.keys import REQUIRED
from litgpt.recipe.paths import resolve_paths
from litgpt.recipe.schema import build_schema
from litgpt.recipe.to_yaml import SECRETS, to_plain

RUN_COMMANDS = (
    "pretrain",
    "finetune",
    "finetune_full",
    "finetune_adapter",
    "finetune_adapter_v2",
    "align",
    "kto",
    "rm",
)
OTHER_KEYS = {"resume", "add_version", *SECRETS}
"""Keys that the form does not have: a run is resumed by a button, and its folder is that of the form."""
SchemaPart = dict[str, Any]


@dataclass(frozen=True)
class FormField:
    """A field of the form.

    Attributes:
        key: of the recipe, with dots.
        help: what it sets.
        default: its text if the field is empty.
        options: texts to choose from.
        is_free: whether other texts are allowed.
        is_mapping: whether it takes several lines, keys and values in YAML.
        classes: the fields of each class that is chosen by its name, for a choice of a class.
    """

    key: str
    help: str
    default: str
    options: list[str]
    is_free: bool
    is_mapping: bool
    is_required: bool
    classes: dict[str, list["FormField"]] = field(default_factory=dict)


@cache
def describe_form(name: str) -> dict[str, Any]:
    """The fields of the form of a command, and which come first.

    Raises:
        UserError: if the command starts no run.
    """
    recipe = import_run_recipe(name)
    fields = list_form_fields(recipe)
    keys = [*COMMANDS[name].positionals, "out_dir", *COMMANDS[name].first]
    known = {item.key for item in fields}
    first = [key if key in known else key.partition(".")[0] for key in keys]  # of a class, if it is one of its fields
    return {"fields": [asdict(item) for item in fields], "first": [key for key in dict.fromkeys(first) if key in known]}


def import_run_recipe(name: str) -> type:
    """Import the recipe of a command that starts a run.

    Raises:
        UserError: if there is no such command.
    """
    if name not in RUN_COMMANDS:
        raise UserError(f"command: {name[:100]!r} starts no run; use {', '.join(RUN_COMMANDS)}")
    return COMMANDS[name].import_recipe()


def list_form_fields(recipe: type) -> list[FormField]:
    """List the fields of a recipe, those of its groups with dotted keys."""
    schema = build_schema(recipe)
    defaults = {entry.key: entry.default for entry in list_entries(recipe)}
    return list(read_fields(schema, schema.get("$defs", {}), defaults))


def read_fields(
    schema: SchemaPart, groups: Mapping[str, SchemaPart], defaults: Mapping[str, Any], prefix: str = ""
) -> Iterator[FormField]:
    """Read the fields of an object of a schema.

    Args:
        groups: the schemas that references name.
        defaults: values by key, which take precedence over those of the schema.
    """
    for name, part in schema.get("properties", {}).items():
        key = prefix + name
        if name in OTHER_KEYS or part.get("description", "").startswith("Another name of"):
            continue
        kinds = list(list_kinds(part, groups))
        group = next((kind for kind in kinds if kind.get("properties")), None)
        if group is not None:
            yield from read_fields(group, groups, defaults, f"{key}.")
            continue
        default = defaults.get(key, part.get("default"))
        classes = {
            short: list(read_fields(init_args, groups, defaults if is_default_class(default, short) else {}, f"{key}."))
            for kind in kinds
            for short, init_args in list_classes(kind)
        }
        types = {kind_type for kind in kinds for kind_type in [kind.get("type")] if isinstance(kind_type, str)}
        options = list(classes) or list(dict.fromkeys(text for kind in kinds for text in list_option_texts(kind)))
        closed = all(list_option_texts(kind) or kind.get("type") == "null" for kind in kinds)
        is_required = name in schema.get("required", ()) and default in (None, REQUIRED)
        yield FormField(
            key=key,
            help=part.get("description", ""),
            default="" if is_required else format_setting(default, classes),
            options=options,
            is_free=not (closed or classes),
            is_mapping="object" in types,
            is_required=is_required,
            classes=classes,
        )


def list_kinds(part: SchemaPart, groups: Mapping[str, SchemaPart]) -> Iterator[SchemaPart]:
    """The alternatives of a schema."""
    if reference := part.get("$ref"):
        yield from list_kinds(groups[reference.removeprefix("#/$defs/")], groups)
    elif "anyOf" in part:
        for kind in part["anyOf"]:
            yield from list_kinds(kind, groups)
    else:
        yield part


def list_classes(kind: SchemaPart) -> Iterator[tuple[str, SchemaPart]]:
    """The names of the classes of a choice, and the schemas of their settings."""
    for choice in kind.get("oneOf", ()):
        properties = choice.get("properties", {})
        for name in properties.get("class_path", {}).get("enum", ()):
            if "." not in name:
                yield name, properties["init_args"]


def list_option_texts(kind: SchemaPart) -> list[str]:
    """The texts of the values that a schema lists."""
    values = kind.get("enum") or ([kind["const"]] if "const" in kind else [])
    return [format_setting(value) for value in values] or ["true", "false"] * (kind.get("type") == "boolean")


def is_default_class(default: Any, name: str) -> bool:
    """Whether the default of a choice is of the class of this name."""
    return type(default).__name__ == name


def format_setting(value: Any, classes: Mapping[str, Any] | None = None) -> str:
    """The text of a value in the form; that of a class is its name."""
    if classes and type(value).__name__ in classes:
        return type(value).__name__
    plain = to_plain(value)
    return plain if isinstance(plain, str) else json.dumps(plain, ensure_ascii=False)


def fill_form(name: str, settings: Mapping[str, Any]) -> dict[str, str]:
    """The texts of the fields for nested settings of a command, such as those that a run has changed."""
    fields = {item["key"]: item for item in describe_form(name)["fields"]}
    texts: dict[str, str] = {}

    def fill(values: Mapping[str, Any], prefix: str) -> None:
        for name, value in values.items():
            key = prefix + name
            if name in OTHER_KEYS:
                continue
            if isinstance(value, Mapping) and "class_path" in value:
                texts[key] = value["class_path"]
                fill(value.get("init_args") or {}, f"{key}.")
            elif isinstance(value, Mapping) and key not in fields:
                fill(value, f"{key}.")
            else:
                texts[key] = format_setting(value)

    fill(settings, "")
    return texts


def read_form(name: str, texts: Mapping[str, str]) -> build.Tree:
    """The settings that the texts of a form are, as the flags of its command would be; empty ones are left out.

    A text names no file to read settings from, and no class that the form does not have.

    Raises:
        UserError: naming the key of the first text that is not valid.
    """
    flags = [build.Flag(key, text) for key, text in texts.items() if text.strip()]
    for flag in flags:
        if flag.key.rpartition(".")[2] in OTHER_KEYS:
            raise UserError(f"{flag.key}: is not a field of this form; start the run on the command line")
    return build.collect_settings(import_run_recipe(name), [], flags, trusted=False)


def check_run_settings(name: str, settings: build.Tree) -> Any:
    """The recipe of a run, checked as its command checks it before anything is trained.

    Raises:
        UserError: naming the key of the first setting that is not valid.
    """
    recipe = resolve_paths(name, build.build_recipe(import_run_recipe(name), settings))
    import_object(f"litgpt.train.early_checks:{COMMANDS[name].check}")(recipe)
    return recipe


def find_wrong_key(error: UserError, keys: Mapping[str, str]) -> str | None:
    """The key of a form that an error is about; None for an error about none."""
    if error.key:
        return error.key
    message = str(error)
    matches = [key for key in keys if message.startswith((f"{key}:", f"{key} "))]
    return max(matches, key=len, default=None)


def choose_out_dir(folder: Path) -> Path:
    """A folder for a new run that does not exist yet, relative to the working folder if it is below it."""
    number = next(number for number in range(1, 10**6) if not (folder / f"run-{number}").exists())
    path = folder / f"run-{number}"
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
