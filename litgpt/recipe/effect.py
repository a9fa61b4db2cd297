"""The error for a setting that another one makes useless."""

from dataclasses import MISSING
from typing import Any

from litgpt.errors import UserError


def describe_no_effect(key: str, value: Any, other: str, cure: str) -> str:
    """Describe a setting that has no effect: `other` is the setting that it has none with."""
    shown = str(value).lower() if isinstance(value, bool) else value
    return f"{key}: {shown} has no effect with {other}; {cure}"


def check_effects(group: Any, prefix: str, *names: str, have_effect: bool, other: str, cure: str) -> None:
    """Check that settings without an effect are at their defaults.

    Args:
        group: a dataclass.
        prefix: its dotted key, with a dot at its end.
        names: the settings.
        have_effect: whether they have an effect.
        other: the setting that they have none with.
        cure: what to change.

    Raises:
        UserError: for the first one that is not.
    """
    for name in names if not have_effect else ():
        field, value = group.__dataclass_fields__[name], getattr(group, name)
        if value != (field.default if field.default_factory is MISSING else field.default_factory()):
            raise UserError(describe_no_effect(prefix + name, value, other, cure))
