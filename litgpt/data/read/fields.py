"""Parse and check the fields of rows: text, numbers, JSON and tool calls."""

import ast
import json
import math
from collections.abc import Mapping
from typing import Any

from litgpt.files import find_surrogate

LITERAL_LIMIT = 1_000_000
"""Maximum characters of a Python literal: Python's parser takes a hundred times the memory of its input."""


class BadRow(Exception):
    """A row that is not a valid conversation.

    Attributes:
        reason: a few words, the same for all rows with this fault, for counting.
        detail: the offending value of this row.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason} ({detail})" if detail else reason)
        self.reason, self.detail = reason, detail


def parse_value(value: Any, name: str) -> Any:
    """Parse a text as JSON, or else as a Python literal; other values are returned unchanged."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        reason = str(error)[:80]
    try:
        if len(value) > LITERAL_LIMIT:
            raise ValueError
        return ast.literal_eval(value)
    except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
        raise BadRow(f"{name}: not JSON", reason) from None


def check_text(value: Any, name: str) -> str:
    """Check that a value is text that UTF-8 can encode."""
    if not isinstance(value, str):
        raise BadRow(f"{name} is not text", type(value).__name__)
    if find_surrogate(value) is not None:
        raise BadRow("unpaired surrogate", name)
    return value


def dump_json(value: Any) -> str:
    """Serialize a value as JSON with keys in their order and non-ASCII characters unescaped."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (ValueError, TypeError, RecursionError) as error:
        raise BadRow("value cannot be serialized as JSON", str(error)[:80]) from None
    return check_text(text, "JSON")


def parse_loss(value: Any) -> bool | None:
    """Parse the `loss` of a message: whether it is trained; None if unset."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int | float) and value in (0, 1):
        return bool(value)
    raise BadRow("loss is not true or false", repr(value)[:80])


def parse_weight(value: Any, name: str) -> float:
    """Parse a loss weight: a number from 0 to 1000000; 1 if unset."""
    if value is None:
        return 1.0
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1e6 or math.isnan(value):
        raise BadRow(f"{name} is not a number from 0 to 1000000", repr(value)[:80])
    return float(value)


def parse_channel(value: Any) -> str | None:
    """Parse the name of a channel."""
    return None if value is None else check_text(str(value) if isinstance(value, int) else value, "channel")


def to_json_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """Convert values to those that JSON has, so that storing them changes nothing; others, such as dates, become text.

    Raises:
        BadRow: for values that cannot be serialized.
    """
    if not values:
        return {}
    try:
        text = json.dumps(values, ensure_ascii=False, default=str)
    except (ValueError, TypeError, RecursionError) as error:
        raise BadRow("value cannot be serialized as JSON", str(error)[:80]) from None
    converted: dict[str, Any] = json.loads(check_text(text, "JSON"))
    return converted


def dump_tool_call(value: Any) -> tuple[str, dict[str, Any]]:
    """Serialize a tool call as JSON with `name` and `arguments`; text in that form is returned unchanged.

    Returns:
        the JSON, and the other fields of the call, with those of its function in `function`.
    """
    call = parse_value(value, "tool call")
    outer: dict[str, Any] | None = None
    if isinstance(call, Mapping) and isinstance(call.get("function"), Mapping):
        outer = {name: item for name, item in call.items() if name != "function" and item is not None}
        value = call = call["function"]
    if not isinstance(call, Mapping):
        raise BadRow("tool call is not an object", type(call).__name__)
    if not isinstance(call.get("name"), str) or not call["name"]:
        raise BadRow("tool call without a name", repr(call.get("name"))[:80])
    arguments = call.get("arguments", call.get("parameters", {}))
    arguments = parse_value(arguments, "tool call arguments") if isinstance(arguments, str) and arguments else arguments
    if not isinstance(arguments or {}, Mapping):
        raise BadRow("tool call arguments are not an object", type(arguments).__name__)
    known = ("name", "arguments", "parameters")
    inner = {name: item for name, item in call.items() if name not in known and item is not None}
    rest = to_json_values(inner if outer is None else outer | ({"function": inner} if inner else {}))
    if isinstance(value, str) and isinstance(call.get("arguments"), Mapping):
        return value, rest
    return dump_json({"name": call["name"], "arguments": arguments or {}}), rest


def dump_tools(value: Any) -> str | None:
    """Serialize the tools of a row as JSON; text that is JSON is returned unchanged."""
    if value is None or value == "" or value == []:
        return None
    tools = parse_value(value, "tools")
    if not isinstance(tools, list | tuple):
        raise BadRow("tools is not a list", type(tools).__name__)
    for tool in tools:
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise BadRow("tool without a name", repr(tool)[:80])
    return value if isinstance(value, str) else dump_json(tools)
