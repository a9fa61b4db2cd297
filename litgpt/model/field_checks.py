"""Checks of the fields of a configuration: types, and the error that names a field."""

import types
from typing import Any, Literal, Union, get_args, get_origin

from litgpt.errors import UserError


def field_error(key: str, problem: str, cure: str) -> UserError:
    """The error for a field: the problem and the cure."""
    return UserError(f"model_config.{key}: {problem}; {cure}")


def check_type(key: str, value: Any, kind: Any) -> Any:
    """`value` if it has the declared type of a field; integral floats pass as integers, `1e9` as a number.

    Raises:
        UserError: naming the field and its type.
    """
    if get_origin(kind) in (types.UnionType, Union):
        if value is None:
            return None
        kind = get_args(kind)[0]
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise field_error(key, f"{value!r} is not a valid choice", f"use one of {', '.join(get_args(kind))}")
        return value
    if kind in (int, float):
        value = parse_number(value)
    if kind is int and isinstance(value, float) and value.is_integer():
        value = int(value)
    accepted = (int, float) if kind is float else get_origin(kind) or kind
    if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
        cure = f"use a value of type {getattr(kind, '__name__', kind)}"
        raise field_error(key, f"{value!r} has the wrong type", cure)
    if isinstance(value, dict) and get_args(kind)[-1] is not Any:
        return {inner_key: check_type(f"{key}.{inner_key}", inner, float) for inner_key, inner in value.items()}
    return value


def parse_number(value: Any) -> Any:
    """Parse text such as `1e9` or `6e-5`, which YAML reads as strings; other values are returned unchanged."""
    if not isinstance(value, str):
        return value
    try:
        return float(value)
    except ValueError:
        return value
