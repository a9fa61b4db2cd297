"""Placeholders for the name and the author of the model in rows about the model itself."""

from collections.abc import Mapping
from typing import Any

from litgpt.data.read.fields import BadRow
from litgpt.errors import UserError

PLACEHOLDERS = {"{{NAME}}": "model_name", "{{AUTHOR}}": "model_author"}
"""The placeholders, and the settings of the texts that replace them."""
LANGUAGE_COLUMN = "tag"


def check_names(key: str, names: str | list[str] | None) -> list[str]:
    """The texts of a setting: one for all rows, or that of Chinese rows and that of the others; empty without any.

    Raises:
        UserError: if there are more, or one is empty.
    """
    listed = [] if names is None else [names] if isinstance(names, str) else list(names)
    if len(listed) > 2 or not all(listed) or names == []:
        raise UserError(f"data.{key}: {names!r} is neither a text nor two; set one, or [Chinese, English]")
    return listed


def fill_placeholders(row: Any, names: Mapping[str, list[str]]) -> Any:
    """A row with the texts of the settings in place of placeholders; a row without any is returned as it is.

    Of two texts, a row whose column `tag` is zh has the first, and others the second.

    Args:
        names: the texts of each setting, as `check_names` returns them.

    Raises:
        BadRow: if a placeholder has no text.
    """
    used = {placeholder: key for placeholder, key in PLACEHOLDERS.items() if contains(row, placeholder)}
    if not used:
        return row
    for placeholder, key in used.items():
        if not names[key]:
            raise BadRow(f"{placeholder} without a text", f"set data.{key}; {placeholder} keeps it as it is")
    number = 0 if isinstance(row, Mapping) and row.get(LANGUAGE_COLUMN) == "zh" else -1
    has_two = any(len(names[key]) == 2 for key in used.values())
    if has_two and isinstance(row, Mapping):
        row = {name: value for name, value in row.items() if name != LANGUAGE_COLUMN}
    return replace_texts(row, {placeholder: names[key][number] for placeholder, key in used.items()})


def contains(value: Any, text: str) -> bool:
    """Whether a text is in one of the texts of a value, in lists and mappings too."""
    if isinstance(value, str):
        return text in value
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return any(contains(item, text) for item in items)


def replace_texts(value: Any, texts: Mapping[str, str]) -> Any:
    """A value with some texts replaced in its texts, in lists and mappings too."""
    if isinstance(value, str):
        for old, new in texts.items():
            value = value.replace(old, new)
        return value
    if isinstance(value, Mapping):
        return {key: replace_texts(item, texts) for key, item in value.items()}
    return [replace_texts(item, texts) for item in value] if isinstance(value, list | tuple) else value
