"""The JSON Schema of recipes, so that editors complete and check YAML."""

from copy import deepcopy
from dataclasses import dataclass, is_dataclass
from functools import cache
from typing import Any

from pydantic import ConfigDict, TypeAdapter, with_config
from pydantic.json_schema import GenerateJsonSchema

from litgpt.recipe.build import DEFAULT_CHOICES, KEY_ALIASES
from litgpt.recipe.choices import CLASS_PATHS, import_class
from litgpt.recipe.data import DataModule
from litgpt.recipe.keys import find_group, list_settings
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


def forbid_extra_keys(cls: type) -> None:
    """Let pydantic read the comments under a dataclass's fields, and refuse other keys, in its groups as well."""
    with_config(STRICT)(cls)
    for hint, _ in list_settings(cls).values():
        if group := find_group(hint):
            forbid_extra_keys(group)


def build_arguments_schema(cls: type) -> dict[str, Any]:
    """The schema of a class's settings."""
    if not is_dataclass(cls):
        return {"type": "object"}
    forbid_extra_keys(cls)
    schema = TypeAdapter(cls).json_schema()
    return inline_refs(schema, schema.pop("$defs", {}))


def inline_refs(schema: Any, groups: dict[str, Any]) -> Any:
    """A schema with the groups that it refers to written out, so that it may stand inside another."""
    if isinstance(schema, list):
        return [inline_refs(part, groups) for part in schema]
    if not isinstance(schema, dict):
        return schema
    if name := schema.get("$ref"):
        return inline_refs(groups[name.removeprefix("#/$defs/")], groups)
    return {key: inline_refs(part, groups) for key, part in schema.items()}


@cache
def build_choice_schema(base: type) -> dict[str, Any]:
    """The schema of a class chosen by name: one of ours with its settings, or anyone's by its dotted path."""
    names: dict[str, list[str]] = {}
    for name, path in CLASS_PATHS[base].items():
        names.setdefault(path, [path]).append(name)
    known = sorted(name for ours in names.values() for name in ours)
    others = {"type": "string", "not": {"enum": known}}
    if base is DataModule:
        others["pattern"] = r"\."
    kinds: list[dict[str, Any]] = [{"enum": known}]
    if base is not Tuner:
        kinds += [others, build_class_schema({"type": "string", **others}, {"type": "object"})]
    for path, ours in names.items():
        kind = build_class_schema({"enum": ours}, build_arguments_schema(import_class(path, path)))
        if DEFAULT_CHOICES[base] in ours:
            kind["required"].remove("class_path")
        kinds.append(kind)
    return {"oneOf": kinds}


def build_class_schema(class_path: dict[str, Any], init_args: dict[str, Any]) -> dict[str, Any]:
    """The schema of {class_path, init_args}; a class with settings that must be given cannot do without init_args."""
    required = ["class_path", "init_args"] if init_args.get("required") else ["class_path"]
    properties = {"class_path": class_path, "init_args": init_args}
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


class RecipeSchemaGenerator(GenerateJsonSchema):
    """Pydantic's generator, with data modules and optimizers as the choices that recipes offer."""

    def is_instance_schema(self, schema: Any) -> dict[str, Any]:
        """The schema of a field that asks for an object: the choice of its class."""
        chosen = schema["cls"] is DataModule
        return deepcopy(build_choice_schema(DataModule)) if chosen else super().is_instance_schema(schema)

    def dataclass_schema(self, schema: Any) -> dict[str, Any]:
        """The schema of a group of keys, or of the choice of an optimizer or tuner."""
        chosen = schema["cls"] in (Optimizer, Tuner)
        return deepcopy(build_choice_schema(schema["cls"])) if chosen else super().dataclass_schema(schema)


def build_schema(recipe: type) -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of a recipe's YAML."""
    forbid_extra_keys(recipe)
    schema = TypeAdapter(recipe).json_schema(schema_generator=RecipeSchemaGenerator)
    for base in filter(is_dataclass, recipe.__mro__[1:]):  # pydantic reads the comments of the class itself alone
        for name, keys in build_schema(base)["properties"].items():
            schema["properties"][name] = keys | schema["properties"][name]
    for alias, key in KEY_ALIASES.items():
        group, name = key.split(".")
        if group in schema["properties"]:
            properties = schema["$defs"][find_group(list_settings(recipe)[group][0]).__name__]["properties"]  # type: ignore
            properties[alias.split(".")[1]] = properties[name]
    return {"$schema": DRAFT, **schema}
