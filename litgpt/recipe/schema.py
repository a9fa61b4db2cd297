"""The JSON Schema of recipes, so that editors complete and check YAML."""

from copy import deepcopy
from dataclasses import dataclass, is_dataclass
from functools import cache
from typing import Any

from pydantic import ConfigDict, TypeAdapter, with_config
from pydantic.json_schema import GenerateJsonSchema

from litgpt.recipe.build import ALIASES, DEFAULT_CHOICES
from litgpt.recipe.choices import import_class, table_of
from litgpt.recipe.data import DataModule
from litgpt.recipe.keys import group_of, settings_of
from litgpt.recipe.optimizer import Optimizer
from litgpt.recipe.tuner import Tuner

DRAFT = "https://json-schema.org/draft/2020-12/schema"
STRICT = ConfigDict(extra="forbid", use_attribute_docstrings=True, arbitrary_types_allowed=True)


@dataclass(frozen=True)
class Schema:
    """Print the JSON Schema of a command's recipe, or of all."""

    command: str | None = None
    """A command, such as pretrain."""
    subcommand: str | None = None
    """Its second word, such as prepare after data."""


def make_strict(cls: type) -> None:
    """Let pydantic read the comments under a dataclass's fields, and refuse other keys, in its groups as well."""
    with_config(STRICT)(cls)
    for hint, _ in settings_of(cls).values():
        if group := group_of(hint):
            make_strict(group)


def arguments_schema(cls: type) -> dict[str, Any]:
    """The schema of a class's settings."""
    if not is_dataclass(cls):
        return {"type": "object"}
    make_strict(cls)
    schema = TypeAdapter(cls).json_schema()
    return inlined(schema, schema.pop("$defs", {}))


def inlined(schema: Any, groups: dict[str, Any]) -> Any:
    """A schema with the groups that it refers to written out, so that it may stand inside another."""
    if isinstance(schema, list):
        return [inlined(part, groups) for part in schema]
    if not isinstance(schema, dict):
        return schema
    if name := schema.get("$ref"):
        return inlined(groups[name.removeprefix("#/$defs/")], groups)
    return {key: inlined(part, groups) for key, part in schema.items()}


@cache
def choice_schema(base: type) -> dict[str, Any]:
    """The schema of a class chosen by name: one of ours with its settings, or anyone's by its dotted path."""
    names: dict[str, list[str]] = {}
    for name, path in table_of(base).items():
        names.setdefault(path, [path]).append(name)
    known = sorted(name for ours in names.values() for name in ours)
    others = {"type": "string", "not": {"enum": known}}
    if base is DataModule:
        others["pattern"] = r"\."
    kinds: list[dict[str, Any]] = [{"enum": known}]
    if base is not Tuner:
        kinds += [others, choice({"type": "string", **others}, {"type": "object"})]
    for path, ours in names.items():
        kind = choice({"enum": ours}, arguments_schema(import_class(path, path)))
        if DEFAULT_CHOICES[base] in ours:
            kind["required"].remove("class_path")
        kinds.append(kind)
    return {"oneOf": kinds}


def choice(class_path: dict[str, Any], init_args: dict[str, Any]) -> dict[str, Any]:
    """The schema of {class_path, init_args}; a class with settings that must be given cannot do without init_args."""
    required = ["class_path", "init_args"] if init_args.get("required") else ["class_path"]
    properties = {"class_path": class_path, "init_args": init_args}
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


class Generator(GenerateJsonSchema):
    """Pydantic's generator, with data modules and optimizers as the choices that recipes offer."""

    def is_instance_schema(self, schema: Any) -> dict[str, Any]:
        """The schema of a field that asks for an object: the choice of its class."""
        chosen = schema["cls"] is DataModule
        return deepcopy(choice_schema(DataModule)) if chosen else super().is_instance_schema(schema)

    def dataclass_schema(self, schema: Any) -> dict[str, Any]:
        """The schema of a group of keys, or of the choice of an optimizer or tuner."""
        chosen = schema["cls"] in (Optimizer, Tuner)
        return deepcopy(choice_schema(schema["cls"])) if chosen else super().dataclass_schema(schema)


def schema_of(recipe: type) -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of a recipe's YAML."""
    make_strict(recipe)
    schema = TypeAdapter(recipe).json_schema(schema_generator=Generator)
    for base in filter(is_dataclass, recipe.__mro__[1:]):  # pydantic reads the comments of the class itself alone
        for name, keys in schema_of(base)["properties"].items():
            schema["properties"][name] = keys | schema["properties"][name]
    for alias, key in ALIASES.items():
        group, name = key.split(".")
        if group in schema["properties"]:
            properties = schema["$defs"][group_of(settings_of(recipe)[group][0]).__name__]["properties"]  # type: ignore
            properties[alias.split(".")[1]] = properties[name]
    return {"$schema": DRAFT, **schema}
