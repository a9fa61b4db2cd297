"""Merge nested mappings of settings, and remove their null values."""

from collections.abc import Mapping
from typing import Any


def names_another_class(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Return whether both mappings name a class and the classes differ."""
    return None not in (names := (old.get("class_path"), new.get("class_path"))) and names[0] != names[1]


def merge_mappings(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Merge two mappings at every depth; `new` takes precedence.

    Lists and single values are replaced, and so is a mapping by one with another class_path.
    """
    merged = dict(old)
    for name, value in new.items():
        before = merged.get(name)
        if isinstance(before, Mapping) and isinstance(value, Mapping) and not names_another_class(before, value):
            value = merge_mappings(before, value)
        merged[name] = value
    return merged


def drop_nulls(value: Any) -> Any:
    """Return a mapping without its null values at every depth; any other value as it is."""
    if not isinstance(value, Mapping):
        return value
    return {key: drop_nulls(item) for key, item in value.items() if item is not None}
