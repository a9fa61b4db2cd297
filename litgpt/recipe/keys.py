"""The keys of a recipe: their types, the nearest right one to a wrong one, and what a value should have been."""

import difflib
import inspect
from collections.abc import Iterable, Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from litgpt.errors import UserError
from litgpt.recipe.bounds import find_limits, resolve_types
from litgpt.recipe.data import DataModule
from litgpt.recipe.optimizer import Optimizer
from litgpt.recipe.tuner import Tuner

REQUIRED = object()
TYPE_WORDS: dict[Any, str] = {
    str: "a text",
    bool: "true or false",
    Path: "a path",
    NoneType: "null",
    float: "a number",
    int: "a whole number",
}


CHOICE_BASES = (DataModule, Optimizer, Tuner)


def list_types(hint: Any) -> list[Any]:
    """The types that a hint allows, without their limits."""
    if get_origin(hint) is Annotated:
        return list_types(get_args(hint)[0])
    if get_origin(hint) in (Union, UnionType):
        return [kind for member in get_args(hint) for kind in list_types(member)]
    return [hint]


def find_group(hint: Any) -> type | None:
    """The dataclass that a hint allows, if its keys are a group of the recipe."""
    return next((kind for kind in list_types(hint) if is_dataclass(kind) and not find_choice_base(kind)), None)  # type: ignore


def find_choice_base(hint: Any) -> type | None:
    """DataModule, Optimizer or Tuner, if the hint asks for one of their subclasses."""
    classes = [kind for kind in list_types(hint) if inspect.isclass(kind)]
    return next((base for base in CHOICE_BASES if any(issubclass(kind, base) for kind in classes)), None)


def list_init_fields(cls: Any) -> list[Field[Any]]:
    """The fields that the constructor of a dataclass takes, in its order: those by name alone come last."""
    return sorted((field for field in fields(cls) if field.init), key=lambda field: field.kw_only is True)


def list_settings(cls: type) -> dict[str, tuple[Any, Any]]:
    """The (type, default) of each setting of a dataclass, or of each argument of another class's constructor."""
    if is_dataclass(cls):
        hints = resolve_types(cls)
        return {field.name: (hints[field.name], get_default(field)) for field in list_init_fields(cls)}
    found = {}
    for name, parameter in list(inspect.signature(cls).parameters.items()):
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            hint = Any if parameter.annotation is parameter.empty else parameter.annotation
            found[name] = (hint, REQUIRED if parameter.default is parameter.empty else parameter.default)
    return found


def get_default(field: Any) -> Any:
    """A field's default, or REQUIRED."""
    if field.default is not MISSING:
        return field.default
    return REQUIRED if field.default_factory is MISSING else field.default_factory()


def has_var_keywords(cls: type) -> bool:
    """Whether a class's constructor has **kwargs, so that no key is wrong."""
    kinds = [parameter.kind for parameter in inspect.signature(cls).parameters.values()]
    return inspect.Parameter.VAR_KEYWORD in kinds


def list_keys(cls: type, prefix: str = "") -> Iterator[str]:
    """Every key of a recipe, the groups' own keys included."""
    for name, (hint, _) in list_settings(cls).items():
        yield prefix + name
        if group := find_group(hint):
            yield from list_keys(group, f"{prefix}{name}.")


def find_nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word that is most like `word`, whatever the case; None if none is."""
    lower = {other.lower(): other for other in known}
    found = difflib.get_close_matches(word.lower(), lower, n=1, cutoff=0.5)
    return lower[found[0]] if found else None


def unknown_key_error(key: str, known: list[str]) -> UserError:
    """The error for a key that does not exist, with the nearest one that does."""
    last = key.rpartition(".")[2]
    same_end = [other for other in known if other.rpartition(".")[2] == last]
    if near := next(iter(same_end), None) or find_nearest(key, known):
        return UserError(f"{key} is not a key; did you mean {near}?")
    return UserError(f"{key} is not a key; the keys here are {', '.join(known[:40])}")


def describe_type(hint: Any) -> str:
    """What a type hint allows, in words."""
    said = []
    for kind in list_types(hint):
        if get_origin(kind) is Literal:
            said += [str(choice) for choice in get_args(kind)]
        elif kind in (int, float) and (limits := find_limits(hint)):
            said.append(f"{TYPE_WORDS[kind]} {limits}")
        elif get_origin(kind) is dict or is_dataclass(kind):
            said.append("keys and values")
        elif get_origin(kind) in (list, tuple):
            said.append("a list such as [0.9, 0.95]" if kind is not list else "a list")
        elif kind in TYPE_WORDS:
            said.append(TYPE_WORDS[kind])
    return " or ".join(said) or getattr(hint, "__name__", str(hint))


def wrong_value_error(key: str, value: Any, hint: Any, default: Any = REQUIRED) -> UserError:
    """The error for a value of the wrong type or size."""
    shown = f"{value!r}"
    shown = shown if len(shown) <= 80 else shown[:77] + "..."
    such_as = f", such as {default}" if isinstance(default, str | int | float | Path) and default != value else ""
    return UserError(f"{key}: {shown} will not do; give {describe_type(hint)}{such_as}")


def parse_whole_number(value: Any) -> Any:
    """1_000_000, 1e9, "30e9" and 2.0 as integers; anything else as it is."""
    try:
        number = Decimal(str(value).strip().replace("_", ""))
    except InvalidOperation:
        return value
    if not number.is_finite() or number.adjusted() > 30 or number != number.to_integral_value():
        return value
    return int(number)


def normalize_leaf(hint: Any, value: Any, key: str, default: Any) -> Any:
    """A value as the type parser wants it: whole numbers as integers, no booleans or empty texts where they mislead.

    Raises:
        UserError: naming the key and what would do.
    """
    kinds = list_types(hint)
    numeric = int in kinds or float in kinds
    nothing = isinstance(value, str) and str not in kinds and value.lstrip()[:1] in ("#", "&")  # YAML reads null
    if nothing or (isinstance(value, bool) and numeric and bool not in kinds) or (value == "" and Path in kinds):
        raise wrong_value_error(key, value, hint, default)
    if isinstance(value, str | float) and int in kinds and float not in kinds:
        return parse_whole_number(value)
    return value
