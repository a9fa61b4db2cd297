"""The table of the options of Megatron-SWIFT and ms-swift: the key of a recipe that each is, or why it is refused."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import Any, Literal

import yaml

from litgpt.files import parse_yaml

State = Literal["same", "other", "translated", "refused"]
TABLES = ("megatron", "swift", "environment")


class RefusedValue(ValueError):
    """A value of an option that cannot be translated; the message is the reason."""


@dataclass(frozen=True, kw_only=True)
class Option:
    """A row of the table.

    Attributes:
        name: the option, without hyphens before it.
        section: the section of the table.
        key: our dotted key; or `KEY: VALUE`, which is set if the option is true. None for an option that sets nothing.
        values: our value for each of theirs, as lower-case text; a value that is missing is refused.
        transform: the name of a function in `option_transforms.TRANSFORMS`.
        is_list: whether it has several values; without a transform its key is a list, also of a single value.
        is_text: whether its values are texts, also if they look like numbers.
        extra: further keys that are set with it (`with` in the table).
        when: what other options must be for an effect: values, joined by commas; `not` and values; `set` or `unset`.
        already: values that need no setting.
        note: what differs, or what happens without a setting.
        reason: why the option, or a value that is not in `values`, is refused.
        aliases: other names.
        hints: the keys that are suggested for its name in a recipe, in the form of `field_names.yaml`.
        state: same for a key of the same meaning, other for another mechanism, translated for another form, refused.
    """

    name: str
    section: str
    key: str | None = None
    values: Mapping[str, Any] = field(default_factory=dict)
    transform: str | None = None
    is_list: bool = False
    is_text: bool = False
    extra: Mapping[str, Any] = field(default_factory=dict)
    when: Mapping[str, str] = field(default_factory=dict)
    already: tuple[str, ...] = ()
    note: str = ""
    reason: str = ""
    aliases: tuple[str, ...] = ()
    hints: tuple[str, ...] = ()
    state: State

    def describe(self) -> str:
        """Return its key or, without one, what happens instead."""
        return self.key or (self.reason if self.state == "refused" else self.note)


def find_state(row: Mapping[str, Any]) -> State:
    """Return the state of a row that names none."""
    if "key" not in row:
        return "refused" if "reason" in row else "other"
    return "translated" if {"values", "transform"} & set(row) or ": " in row["key"] else "same"


def find_hints(row: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the hints of a row that names none: its key, and for one of data also its class."""
    key = row.get("key")
    if key is None:
        return ()
    return (key, f"data: Conversations and {key}") if key.startswith("data.") else (key,)


def write_value(value: Any) -> str:
    """Return a value as it is compared: lower-case text."""
    return str(value).lower()


def write_condition(value: Any) -> str:
    """Return the values of a condition as a text."""
    return write_value(value) if isinstance(value, bool) else str(value)


def build_option(name: str, section: str, row: Mapping[str, Any]) -> Option:
    """Build an option from its row."""
    fields = {"state": find_state(row), **row, "hints": tuple(row.get("hints", find_hints(row)))}
    fields["extra"] = fields.pop("with", {})
    fields["values"] = {write_value(value): setting for value, setting in row.get("values", {}).items()}
    fields["when"] = {other: write_condition(values) for other, values in row.get("when", {}).items()}
    fields["already"] = tuple(map(write_value, row.get("already", ())))
    fields["aliases"] = tuple(row.get("aliases", ()))
    return Option(name=name, section=section, **fields)


def read_table(name: str) -> dict[str, Any]:
    """Read a file of the table."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast, if PyYAML was built with libyaml
    text = (files("litgpt.recipe") / "options" / f"{name}.yaml").read_text(encoding="utf-8")
    return parse_yaml(text, f"{name}.yaml", loader)


@cache
def load_options() -> tuple[Option, ...]:
    """Load all options, in the order of the table."""
    return tuple(
        build_option(name, section, row)
        for table in TABLES
        for section, rows in read_table(table).items()
        for name, row in rows.items()
    )


@cache
def index_options() -> dict[str, Option]:
    """Load the options by their names and aliases."""
    return {name: option for option in load_options() for name in (option.name, *option.aliases)}


@cache
def load_defaults() -> dict[str, dict[str, dict[str, Any]]]:
    """Load the defaults of options: by program, and by `always`, a tuner or a command."""
    return read_table("defaults")


def list_hints() -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield the names of options, in lower case and without those that no key is suggested for, and their hints."""
    for name, option in index_options().items():
        if option.hints:
            yield name.lower(), option.hints
