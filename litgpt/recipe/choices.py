"""Classes that a recipe selects by name, as {class_path, init_args}: data modules, optimizers and tuners."""

import importlib
import inspect
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from litgpt.errors import UserError
from litgpt.mappings import merge_mappings, names_another_class
from litgpt.recipe import keys
from litgpt.recipe.data import DATA_MODULES, DataModule
from litgpt.recipe.optimizer import OPTIMIZER_ALIASES, OPTIMIZERS, Custom, Optimizer
from litgpt.recipe.tuner import TUNERS, Tuner
from litgpt.recipe.unknown_key import unknown_key_error

OPTIMIZER_PATHS = {name: f"{cls.__module__}.{name}" for name, cls in OPTIMIZERS.items()}
OPTIMIZER_PATHS |= {alias: OPTIMIZER_PATHS[name] for alias, name in OPTIMIZER_ALIASES.items()}
TUNER_PATHS = {name: f"{cls.__module__}.{name}" for name, cls in TUNERS.items()}
CLASS_PATHS: dict[type, dict[str, str]] = {DataModule: DATA_MODULES, Optimizer: OPTIMIZER_PATHS, Tuner: TUNER_PATHS}
DEFAULT_CLASSES: dict[type, str] = {Optimizer: "AdamW", Tuner: "LoRA"}
"""The classes of choices without a default and without a class; that of `data` depends on the command."""
DOTTED = re.compile(r"[A-Za-z_]\w*\.[A-Za-z_]")
SPARSE_OPTIMIZERS = {"torch.optim.SparseAdam": "sparse gradients"}
ROW_FILES = (".json", ".jsonl", ".csv", ".parquet", ".txt", ".gz", ".zst")
ClassChoice = dict[str, Any]


def resolve_class_path(base: type, name: str, key: str, trusted: bool) -> str:
    """Return the dotted path of a class that a recipe names.

    Raises:
        UserError: if the name is unknown, or if one that is not trusted, as in a recipe from a URL, is that of a class
            outside of this package and `torch.optim`.
    """
    table = CLASS_PATHS[base]
    if name in table or name in table.values():
        return table.get(name, name)
    if base is Optimizer and "." not in name:
        name = f"torch.optim.{name}"
    if not trusted and name.rpartition(".")[0] != "torch.optim":
        raise UserError(
            f"{key}: {name!r} is not a class of litgpt, and only the command line and files on this machine may name "
            f"others; {suggest_names(table, dotted=False)}"
        )
    if base is DataModule and (name.endswith(ROW_FILES) or "/" in name or Path(name).exists()):
        raise UserError(
            f"{key}: {name!r} is a path or a name on the hub, and not a class; set data: Conversations and "
            f"data.sources: [{name}]"
        )
    if "." in name and base is not Tuner:
        return name
    near = keys.find_nearest(name, table)
    raise UserError(f"{key}: {name!r} is not known; " + (f"did you mean {near}?" if near else suggest_names(table)))


def suggest_names(table: Mapping[str, str], *, dotted: bool = True) -> str:
    """Return the accepted names of a table as the last part of an error message.

    Args:
        dotted: whether the path of a class outside of the table is accepted, unless it is the table of tuners.
    """
    names = ", ".join(name for name in table if "." not in name)
    return f"use {names}, or the dotted path of a class" if dotted and table is not TUNER_PATHS else f"use {names}"


def parse_choice(base: type, value: Any, key: str, trusted: bool = True) -> ClassChoice | None:
    """Convert a choice to {class_path, init_args} from a name, or a mapping with or without init_args."""
    if value is None:
        return None
    class_key = key if isinstance(value, str) else f"{key}.class_path"
    if isinstance(value, str):
        value = {"class_path": value}
    if not isinstance(value, dict):
        raise UserError(f"{key}: {value!r} is not valid; {suggest_names(CLASS_PATHS[base])}")
    init_args = {} if value.get("init_args") is None else value["init_args"]
    if not isinstance(init_args, dict):
        raise UserError(f"{key}.init_args: {init_args!r} is not valid; use keys and values")
    direct = {name: item for name, item in value.items() if name not in ("class_path", "init_args")}
    arguments = merge_mappings(direct, init_args)
    if not trusted and DOTTED.search(str(arguments.get("prompt_style", "")).replace("litgpt.prompts.", "")):
        raise UserError(
            f"{key}.prompt_style: a class is only allowed on the command line and in files on this machine; use a name"
        )
    choice: ClassChoice = {"init_args": arguments}
    if (name := value.get("class_path")) is not None:
        if not isinstance(name, str):
            raise UserError(f"{class_key}: {name!r} is not valid; {suggest_names(CLASS_PATHS[base])}")
        choice["class_path"] = resolve_class_path(base, name, class_key, trusted)
    return choice


def merge_choice(old: ClassChoice | None, new: ClassChoice | None) -> ClassChoice | None:
    """Merge two choices; `new` takes precedence, and the arguments of a different class are dropped."""
    if not old or not new or names_another_class(old, new):
        return new
    return merge_mappings(old, new)


def find_default_class(recipe: type, name: str) -> str | None:
    """Return the name of the class of a choice that names none, such as `data` in a recipe; None without a default."""
    hint, default = keys.list_settings(recipe)[name]
    base = keys.find_choice_base(hint)
    assert base is not None
    if isinstance(default, base):
        return type(default).__name__
    return getattr(recipe, "default_data", None) if base is DataModule else DEFAULT_CLASSES[base]


def name_default_classes(recipe: type, tree: dict[str, Any]) -> dict[str, Any]:
    """Return the settings with the class of each choice whose keys are set without one.

    Raises:
        UserError: if a choice names no class and has no default.
    """
    named = dict(tree)
    for name, (hint, _) in keys.list_settings(recipe).items():
        base, choice = keys.find_choice_base(hint), tree.get(name)
        is_null = choice is None and name in tree and type(None) not in keys.list_types(hint)
        if base is None or not (is_null or (isinstance(choice, dict) and "class_path" not in choice)):
            continue
        default = find_default_class(recipe, name)
        if default is None:
            raise UserError(f"{name}.class_path: missing; {suggest_names(CLASS_PATHS[base])}")
        named[name] = merge_choice(parse_choice(base, default, name), choice or {"init_args": {}})
    return named


def build_default_data(recipe: Any) -> DataModule:
    """Build the data module of a recipe that has none.

    Raises:
        UserError: if its command needs one.
    """
    name = find_default_class(type(recipe), "data")
    if getattr(recipe, "requires_data", False):
        raise UserError(f"data: missing; set data: {name}, and data.sources: a file of rows")
    return import_class(DATA_MODULES[str(name)], "data")()


def import_user_module(name: str) -> ModuleType:
    """Import a module, which may also be a file in the working directory."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        if os.getcwd() in sys.path:
            raise
        sys.path.append(os.getcwd())  # kept, because the worker processes of data loading need it too
        return importlib.import_module(name)


def import_class(path: str, key: str) -> type:
    """Import the class at a dotted path.

    Raises:
        UserError: if the module cannot be imported, or has no class of that name.
    """
    module, _, name = path.rpartition(".")
    try:
        cls = getattr(import_user_module(module), name, None)
    except (ImportError, ValueError, TypeError) as error:
        raise UserError(f"{key}: {path!r} cannot be imported ({error})") from None
    if not inspect.isclass(cls):
        names = [other for other in dir(import_user_module(module)) if not other.startswith("_")]
        near = keys.find_nearest(name, [*names, *OPTIMIZERS])
        raise UserError(f"{key}: class {path} not found" + (f"; did you mean {near}?" if near else ""))
    return cls


def convert_numbers(value: Any) -> Any:
    """Convert strings that are numbers, such as 4e-4 in YAML, to numbers, also in lists."""
    if isinstance(value, list):
        return [convert_numbers(item) for item in value]
    if not isinstance(value, str) or isinstance(keys.parse_whole_number(value), int):
        return keys.parse_whole_number(value) if isinstance(value, str) else value
    try:
        return float(value)
    except ValueError:
        return value


def find_unsupported_step(path: str, cls: Any) -> str | None:
    """Return what the step() of an optimizer class needs that training does not give it; None if it needs nothing."""
    parameters = list(inspect.signature(cls.step).parameters.values())[1:]
    has_argument = any(arg.default is arg.empty and arg.kind is arg.POSITIONAL_OR_KEYWORD for arg in parameters)
    return SPARSE_OPTIMIZERS.get(path) or ("a closure" if has_argument else None)


def normalize_custom_optimizer(choice: ClassChoice, key: str) -> ClassChoice:
    """Check the choice of an optimizer without a settings class against the signature of its constructor."""
    path, arguments = choice["class_path"], {name: convert_numbers(item) for name, item in choice["init_args"].items()}
    cls = import_class(path, key)
    if not callable(getattr(cls, "step", None)):
        raise UserError(f"{key}: {path} is not an optimizer: it has no step() method")
    if reason := find_unsupported_step(path, cls):
        raise UserError(f"{key}: {path} is not supported, because it needs {reason}; use AdamW")
    known = keys.list_settings(cls)
    known.pop(next(iter(known), ""), None)  # the parameters to optimize
    if "lr" not in known and not keys.has_var_keywords(cls):
        raise UserError(f"{key}: {path} takes no lr, which is set at every step; use a class that takes it, or AdamW")
    for name in arguments:
        if name not in known and not keys.has_var_keywords(cls):
            raise unknown_key_error([f"{key}.{name}"], [f"{key}.{other}" for other in known])
    default = known.get("lr", (None, keys.REQUIRED))[1]
    rate = arguments.pop("lr", default if isinstance(default, float) else 1e-3)
    return {
        "class_path": f"{Custom.__module__}.{Custom.__name__}",
        "init_args": {"lr": rate, "path": path, "arguments": arguments},
    }
