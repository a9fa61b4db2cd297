"""The error for a setting that another one makes useless."""

from collections.abc import Iterable
from typing import Any

from litgpt.errors import UserError

Effect = tuple[str, Any, bool, str, str]
"""Name of a setting, its default, whether it has an effect, the setting that it has none with, and the cure."""


def describe_no_effect(key: str, value: Any, other: str, cure: str) -> str:
    """Describe a setting that has no effect: `other` is the setting that it has none with."""
    shown = str(value).lower() if isinstance(value, bool) else value
    return f"{key}: {shown} has no effect with {other}; {cure}"


def check_effects(group: Any, prefix: str, rules: Iterable[Effect]) -> None:
    """Check that every setting of a group that is not at its default has an effect.

    Args:
        prefix: the dotted key of the group, with a dot at its end.

    Raises:
        UserError: for the first one without.
    """
    for name, default, has_effect, other, cure in rules:
        value = getattr(group, name)
        if not has_effect and value != default:
            raise UserError(describe_no_effect(prefix + name, value, other, cure))
