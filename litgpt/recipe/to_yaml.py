"""Write a recipe as YAML that loads as the same recipe, without secrets."""

import inspect
from collections.abc import Mapping
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import yaml

from litgpt.recipe.data import DATA_MODULES, DataModule
from litgpt.recipe.keys import REQUIRED, list_init_fields, list_settings
from litgpt.recipe.object_url import format_path
from litgpt.recipe.optimizer import Custom, Optimizer
from litgpt.recipe.tuner import Tuner

SECRETS = ("access_token", "token", "password", "api_key")


def get_class_name(value: Any) -> str:
    """Return the name of an object's class in a recipe: its short name, or its dotted path for a user's class."""
    cls = type(value)
    is_named = cls.__name__ in DATA_MODULES or isinstance(value, Optimizer | Tuner)
    has_short_name = is_named and cls.__module__.startswith("litgpt.")
    return cls.__name__ if has_short_name else f"{cls.__module__}.{cls.__qualname__}"


def read_arguments(value: Any) -> dict[str, Any]:
    """Read the constructor arguments of an object from its attributes of the same names."""
    if is_dataclass(value):
        names = [field.name for field in list_init_fields(value)]
    else:
        names = [name for name in inspect.signature(type(value)).parameters if hasattr(value, name)]
    return {name: to_plain(getattr(value, name)) for name in names if name not in SECRETS}


def read_changed_arguments(value: Any) -> dict[str, Any]:
    """Read the constructor arguments of an object that differ from the defaults of its class."""
    defaults = {name: to_plain(default) for name, (_, default) in list_settings(type(value)).items()}
    return {
        name: item for name, item in read_arguments(value).items() if name not in defaults or item != defaults[name]
    }


def to_plain(value: Any) -> Any:
    """Convert a setting to the types of YAML."""
    if isinstance(value, Custom):
        return {"class_path": value.path, "init_args": {"lr": value.lr, **to_plain(value.arguments)}}
    if isinstance(value, DataModule | Optimizer | Tuner):
        return {"class_path": get_class_name(value), "init_args": read_arguments(value)}
    if is_dataclass(value):
        return read_arguments(value)
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items() if key not in SECRETS}
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    if value is None or isinstance(value, str | int | float):
        return value
    return format_path(value) if isinstance(value, Path) else {"class_path": get_class_name(value)}


def drop_defaults(tree: dict[str, Any], default: dict[str, Any]) -> dict[str, Any]:
    """Return the keys of `tree` whose values differ from `default`, group by group; a choice is kept whole."""
    kept = {}
    for key, value in tree.items():
        other = default.get(key)
        if isinstance(value, dict) and isinstance(other, dict) and "class_path" not in value:
            value, other = drop_defaults(value, other), {}
        if value != other:
            kept[key] = value
    return kept


def find_changes(recipe: Any) -> dict[str, Any]:
    """Return the settings of a recipe that differ from the defaults of its command, and those without a default."""
    required = {
        name: getattr(recipe, name) for name, (_, default) in list_settings(type(recipe)).items() if default is REQUIRED
    }
    default = to_plain(type(recipe)(**required))
    changes = drop_defaults(to_plain(recipe), {key: value for key, value in default.items() if key not in required})
    for name in changes:
        value = getattr(recipe, name)
        if isinstance(value, DataModule | Optimizer | Tuner) and not isinstance(value, Custom):
            changes[name] = {"class_path": get_class_name(value), "init_args": read_changed_arguments(value)}
    return changes


def format_yaml(tree: dict[str, Any]) -> str:
    """Format a mapping as YAML, keeping its order."""
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=120)


def dump_recipe(recipe: Any) -> str:
    """Format a recipe as YAML that loads as an equal recipe; secrets are omitted."""
    return format_yaml(to_plain(recipe))
