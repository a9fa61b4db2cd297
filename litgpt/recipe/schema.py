"""The JSON Schema of recipes, with which editors complete and validate YAML files."""

from copy import deepcopy
from dataclasses import dataclass, is_dataclass
from functools import cache
from typing import Any

from pydantic import ConfigDict, TypeAdapter, with_config
from pydantic.json_schema import GenerateJsonSchema

from litgpt.recipe.build import find_aliases
from litgpt.recipe.choices import CLASS_PATHS, find_default_class, import_class
from litgpt.recipe.data import DataModule
from litgpt.recipe.keys import find_choice_base, find_group, list_settings
from litgpt.recipe.optimizer import Optimizer
from litgpt.recipe.tuner import Tuner

DRAFT = "https://json-schema.org/draft/2020-12/schema"
STRICT = ConfigDict(extra="forbid", use_attribute_docstrings=True, arbitrary_types_allowed=True)


@dataclass(frozen=True)
class Schema:
    """Print the JSON Schema of the recipe of one or all commands."""

    command: str | None = None
    """The command, such as pretrain; null for all commands."""
    subcommand: str | None = None
    """The second word of the command, such as prepare in `data prepare`."""


def forbid_extra_keys(cls: type) -> None:
    """Configure pydantic to forbid extra keys and read field docstrings, for a dataclass and its groups."""
    with_config(STRICT)(cls)
    for hint, _ in list_settings(cls).values():
        if group := find_group(hint):
            forbid_extra_keys(group)


def build_arguments_schema(cls: type) -> dict[str, Any]:
    """Build the schema of the settings of a class."""
    if not is_dataclass(cls):
        return {"type": "object"}
    forbid_extra_keys(cls)
    schema = TypeAdapter(cls).json_schema()
    return inline_refs(schema, schema.pop("$defs", {}))


def inline_refs(schema: Any, groups: dict[str, Any]) -> Any:
    """Replace references in a schema by the groups that they refer to, so that it can be nested in another schema."""
    if isinstance(schema, list):
        return [inline_refs(part, groups) for part in schema]
    if not isinstance(schema, dict):
        return schema
    if name := schema.get("$ref"):
        return inline_refs(groups[name.removeprefix("#/$defs/")], groups)
    return {key: inline_refs(part, groups) for key, part in schema.items()}


@cache
def build_choice_schema(base: type) -> dict[str, Any]:
    """Build the schema of a class selected by name: a known class with its settings, or any class by dotted path."""
    names: dict[str, list[str]] = {}
    for name, path in CLASS_PATHS[base].items():
        names.setdefault(path, [path]).append(name)
    known = sorted(name for spellings in names.values() for name in spellings)
    others = {"type": "string", "not": {"enum": known}}
    if base is DataModule:
        others["pattern"] = r"\."
    kinds: list[dict[str, Any]] = [{"enum": known}]
    if base is not Tuner:
        kinds += [others, build_class_schema({"type": "string", **others}, {"type": "object"})]
    for path, spellings in names.items():
        kinds.append(build_class_schema({"enum": spellings}, build_arguments_schema(import_class(path, path))))
    return {"oneOf": kinds}


def build_class_schema(class_path: dict[str, Any], init_args: dict[str, Any]) -> dict[str, Any]:
    """Build the schema of {class_path, init_args}; init_args is required if one of the settings is required."""
    required = ["class_path", "init_args"] if init_args.get("required") else ["class_path"]
    properties = {"class_path": class_path, "init_args": init_args}
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


class RecipeSchemaGenerator(GenerateJsonSchema):
    """Pydantic's generator, with data modules, optimizers and tuners as choices of a class."""

    def is_instance_schema(self, schema: Any) -> dict[str, Any]:
        """Return the schema of a field whose type is a plain class: a data module."""
        is_choice = schema["cls"] is DataModule
        return deepcopy(build_choice_schema(DataModule)) if is_choice else super().is_instance_schema(schema)

    def dataclass_schema(self, schema: Any) -> dict[str, Any]:
        """Return the schema of a group of keys, or of the choice of an optimizer or tuner."""
        is_choice = schema["cls"] in (Optimizer, Tuner)
        return deepcopy(build_choice_schema(schema["cls"])) if is_choice else super().dataclass_schema(schema)


def make_class_path_optional(recipe: type, schema: dict[str, Any], name: str) -> None:
    """Let a choice of a recipe leave out the class_path, in its schema, for its default class."""
    base, default = find_choice_base(list_settings(recipe)[name][0]), find_default_class(recipe, name)
    choice = schema.get("$defs", {}).get(base.__name__) or schema["properties"][name]  # type: ignore
    kinds = next(part["oneOf"] for part in (choice, *choice.get("anyOf", ())) if "oneOf" in part)
    for kind in kinds:
        if default in kind.get("properties", {}).get("class_path", {}).get("enum", ()):
            kind["required"] = [key for key in kind["required"] if key != "class_path"]


def add_aliases(recipe: type, schema: dict[str, Any]) -> None:
    """Add the other names of keys to the schema of a recipe, in their groups."""
    settings = list_settings(recipe)
    for alias, key in find_aliases(recipe).items():
        group, name = alias.split(".")
        if group in settings:
            properties = schema["$defs"][find_group(settings[group][0]).__name__]["properties"]  # type: ignore
            properties[name] = properties[key.rpartition(".")[2]]
        else:
            keys = {"type": "object", "properties": {name: schema["properties"][key]}, "additionalProperties": False}
            schema["properties"][group] = {"description": f"Another name of {key}.", **keys}


def accept_digits(schema: Any) -> None:
    """Let paths in a schema, and strings where a list is accepted too, be integers, which are names of digits."""
    if isinstance(schema, dict):
        kinds = schema.get("anyOf", ())
        has_list = any(kind.get("type") == "array" for kind in kinds)
        for kind in (schema, *kinds):
            if kind.get("format") == "path" or (has_list and kind == {"type": "string"}):
                kind["type"] = ["string", "integer"]
    for part in schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else ():
        accept_digits(part)


def build_schema(recipe: type) -> dict[str, Any]:
    """Build the JSON Schema (draft 2020-12) of the YAML of a recipe."""
    forbid_extra_keys(recipe)
    schema = TypeAdapter(recipe).json_schema(schema_generator=RecipeSchemaGenerator)
    for base in filter(is_dataclass, recipe.__mro__[1:]):  # pydantic ignores inherited docstrings
        for name, keys in build_schema(base)["properties"].items():
            schema["properties"][name] = keys | schema["properties"][name]
    for name, (hint, _) in list_settings(recipe).items():
        if find_choice_base(hint):
            make_class_path_optional(recipe, schema, name)
    add_aliases(recipe, schema)
    accept_digits(schema)
    return {"$schema": DRAFT, **schema}
