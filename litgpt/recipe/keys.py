"""The keys of a recipe and their types, and the errors for unknown keys and invalid values."""

import difflib
import inspect
from collections.abc import Iterable, Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from litgpt.errors import UserError
from litgpt.files import find_surrogate
from litgpt.recipe.bounds import find_limits, resolve_types
from litgpt.recipe.data import DataModule
from litgpt.recipe.optimizer import Optimizer
from litgpt.recipe.tuner import Tuner

REQUIRED = object()
TYPE_WORDS: dict[Any, str] = {
    str: "a string",
    bool: "true or false",
    Path: "a path",
    NoneType: "null",
    float: "a number",
    int: "an integer",
}
CHOICE_BASES = (DataModule, Optimizer, Tuner)


def list_types(hint: Any) -> list[Any]:
    """List the types that a hint allows, without their limits."""
    if get_origin(hint) is Annotated:
        return list_types(get_args(hint)[0])
    if get_origin(hint) in (Union, UnionType):
        return [kind for member in get_args(hint) for kind in list_types(member)]
    return [hint]


def check_utf8(value: Any, key: str) -> None:
    """Check all texts of a value, which has a lone surrogate for each byte of a command line that is not UTF-8.

    Raises:
        UserError: naming the key of the first that is not UTF-8.
    """
    if isinstance(value, dict):
        for name, member in value.items():
            part = "" if name in ("class_path", "init_args") else str(name)
            check_utf8(str(name), key)
            check_utf8(member, f"{key}.{part}".strip("."))
    elif isinstance(value, list):
        for member in value:
            check_utf8(member, key)
    elif isinstance(value, str) and (position := find_surrogate(value)) is not None:
        raise UserError(f"{key}: {value[:40]!r} is not UTF-8 at character {position + 1}; give it in UTF-8")


def find_group(hint: Any) -> type | None:
    """Return the dataclass that a hint allows if its fields are a group of keys in the recipe, or None."""
    return next((kind for kind in list_types(hint) if is_dataclass(kind) and not find_choice_base(kind)), None)  # type: ignore


def find_item_group(hint: Any) -> type | None:
    """Return the dataclass of the items of a list that a hint allows, or None."""
    items = [item for kind in list_types(hint) if get_origin(kind) is list for item in get_args(kind)]
    return next((item for item in items if is_dataclass(item)), None)  # type: ignore[return-value]


def find_choice_base(hint: Any) -> type | None:
    """Return DataModule, Optimizer or Tuner if the hint is one of their subclasses, or None."""
    classes = [kind for kind in list_types(hint) if inspect.isclass(kind)]
    return next((base for base in CHOICE_BASES if any(issubclass(kind, base) for kind in classes)), None)


def list_init_fields(cls: Any) -> list[Field[Any]]:
    """List the fields in the constructor of a dataclass, in the order of its parameters: keyword-only ones last."""
    return sorted((field for field in fields(cls) if field.init), key=lambda field: field.kw_only is True)


def list_settings(cls: type) -> dict[str, tuple[Any, Any]]:
    """Return (type, default) by name: of the fields of a dataclass, or the constructor arguments of any other class."""
    if is_dataclass(cls):
        hints = resolve_types(cls)
        return {field.name: (hints[field.name], get_default(field)) for field in list_init_fields(cls)}
    settings = {}
    for name, parameter in list(inspect.signature(cls).parameters.items()):
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            hint = Any if parameter.annotation is parameter.empty else parameter.annotation
            settings[name] = (hint, REQUIRED if parameter.default is parameter.empty else parameter.default)
    return settings


def get_default(field: Any) -> Any:
    """Return the default of a dataclass field, or REQUIRED."""
    if field.default is not MISSING:
        return field.default
    return REQUIRED if field.default_factory is MISSING else field.default_factory()


def has_var_keywords(cls: type) -> bool:
    """Return whether the constructor of a class has **kwargs, and therefore accepts any key."""
    kinds = [parameter.kind for parameter in inspect.signature(cls).parameters.values()]
    return inspect.Parameter.VAR_KEYWORD in kinds


def list_keys(cls: type, prefix: str = "") -> Iterator[str]:
    """Yield every key of a recipe, including the dotted keys of its groups."""
    for name, (hint, _) in list_settings(cls).items():
        yield prefix + name
        if group := find_group(hint):
            yield from list_keys(group, f"{prefix}{name}.")


def find_nearest(word: str, known: Iterable[str]) -> str | None:
    """Return the known word most similar to `word`, ignoring case; None if none is similar."""
    lower = {other.lower(): other for other in known}
    matches = difflib.get_close_matches(word.lower(), lower, n=1, cutoff=0.5)
    return lower[matches[0]] if matches else None


def describe_type(hint: Any) -> str:
    """Describe the values that a type hint allows."""
    words = []
    for kind in list_types(hint):
        if get_origin(kind) is Literal:
            words += [str(choice) for choice in get_args(kind)]
        elif kind in (int, float) and (limits := find_limits(hint)):
            words.append(f"{TYPE_WORDS[kind]} {limits}")
        elif get_origin(kind) is dict or is_dataclass(kind):
            words.append("keys and values")
        elif get_origin(kind) in (list, tuple):
            items = [item for part in get_args(kind) for item in list_types(part)]
            choices = [str(choice) for item in items if get_origin(item) is Literal for choice in get_args(item)]
            bounds = "".join(f" of numbers {text}," for part in get_args(kind)[:1] if (text := find_limits(part)))
            words.append(f"a list{bounds} such as [0.9, 0.95]" if {float, int} & set(items) else "a list")
            words[-1] += f" of {', '.join(choices)}" if set(choices) - set(words) else " of these" if choices else ""
        elif kind in TYPE_WORDS:
            words.append(TYPE_WORDS[kind])
    return " or ".join(words) or getattr(hint, "__name__", str(hint))


def wrong_value_error(key: str, value: Any, hint: Any, default: Any = REQUIRED) -> UserError:
    """Return the error for a value of the wrong type or out of range."""
    shown = f"{value!r}"
    shown = shown if len(shown) <= 80 else shown[:77] + "..."
    example = f", such as {default}" if isinstance(default, str | int | float | Path) and default != value else ""
    return UserError(f"{key}: {shown} is not valid; use {describe_type(hint)}{example}")


def single_value_error(key: str, value: Any, group: type) -> UserError:
    """Return the error for a single value in place of a group of settings."""
    first = next(iter(list_settings(group)))
    return UserError(f"{key}: {value!r} is a single value for a group of settings; set {key}.{first} or its other keys")


def parse_whole_number(value: Any) -> Any:
    """Convert 1_000_000, 1e9, "30e9" and 2.0 to integers; return any other value unchanged."""
    try:
        number = Decimal(str(value).strip().replace("_", ""))
    except InvalidOperation:
        return value
    if not number.is_finite() or number.adjusted() > 30 or number != number.to_integral_value():
        return value
    return int(number)


def normalize_leaf(hint: Any, value: Any, key: str, default: Any) -> Any:
    """Prepare a single value for type conversion: integers, also of paths; reject booleans for numbers and empty paths.

    Raises:
        UserError: naming the key, its value and the accepted values.
    """
    kinds = list_types(hint)
    numeric = int in kinds or float in kinds
    is_yaml_null = isinstance(value, str) and str not in kinds and value.lstrip()[:1] in ("#", "&")
    if is_yaml_null or (isinstance(value, bool) and numeric and bool not in kinds) or (value == "" and Path in kinds):
        raise wrong_value_error(key, value, hint, default)
    if isinstance(value, str | float) and int in kinds and float not in kinds:
        return parse_whole_number(value)
    is_path = Path in kinds or (str in kinds and any(get_origin(kind) is list for kind in kinds))
    if type(value) is int and is_path and not numeric:
        return str(value)  # a name of digits
    return value
