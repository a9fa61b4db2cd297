"""Calls of tools: how models write them, how they are read from a text, and the schema of a call that is required."""

import json
import re
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from litgpt.data.render.chat_template import ChatTemplate
from litgpt.infer.server.errors import ApiError

Tools = Sequence[Mapping[str, Any]]
BETWEEN_CALLS = re.compile(r"[\s;]*")
FUNCTION = re.compile(r"\s*<function=([^>\s]+)>(.*)</function>\s*", re.DOTALL)
PARAMETER = re.compile(r"<parameter=([^>]+)>\n?(.*?)\n?</parameter>", re.DOTALL)


@dataclass(frozen=True)
class CallFormat:
    """How a model writes calls.

    Attributes:
        template: texts that the chat template contains.
        start: text, often a special token, before calls.
        end: text after each call, before which `start` is repeated; empty if nothing follows the calls.
        is_bare: whether an answer that begins with a JSON object is a call without `start`.
        arguments: name of the arguments in the JSON object of a call.
        opening: what an answer that must be a call begins with, before JSON.
        is_list: whether a list of calls follows the opening.
        read: the name and arguments of each call in a text between `start` and `end`.
    """

    template: tuple[str, ...]
    start: str
    end: str
    read: Callable[[str, str, Tools], list[tuple[str, Any]]]
    is_bare: bool = False
    arguments: str = "arguments"
    opening: str = ""
    is_list: bool = False


def read_json_calls(text: str, arguments: str, _tools: Tools) -> list[tuple[str, Any]]:
    """Read calls that are JSON objects or lists of them, apart by spaces or semicolons.

    Raises:
        ValueError: if the text is anything else.
    """
    calls: list[Any] = []
    position = BETWEEN_CALLS.match(text).end()  # type: ignore[union-attr]
    while position < len(text):
        value, position = json.JSONDecoder().raw_decode(text, position)
        calls += value if isinstance(value, list) else [value]
        position = BETWEEN_CALLS.match(text, position).end()  # type: ignore[union-attr]
    if not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
        raise ValueError("not an object with a name")
    return [(call["name"], call.get(arguments, {})) for call in calls]


def read_xml_call(text: str, _arguments: str, tools: Tools) -> list[tuple[str, Any]]:
    """Read a call with an element for each argument: JSON, unless the schema of the tool says that it is a text.

    Raises:
        ValueError: if the text is anything else.
    """
    match = FUNCTION.fullmatch(text)
    if match is None:
        raise ValueError("not a function")
    name, types = match[1], get_types(match[1], tools)
    return [(name, {key: parse_argument(value, types.get(key)) for key, value in PARAMETER.findall(match[2])})]


def parse_argument(text: str, kind: Any) -> Any:
    """An argument of this type in a schema: the text itself, or the value that it is as JSON."""
    try:
        return text if kind == "string" else json.loads(text)
    except json.JSONDecodeError:
        return text


CALL_MARKS = ("<tool_call>", "</tool_call>")
CALL_FORMATS = (
    CallFormat(("<function=", "<parameter="), *CALL_MARKS, read_xml_call),  # Qwen 3 Coder
    CallFormat(("<tool_call>",), *CALL_MARKS, read_json_calls, opening="<tool_call>\n"),  # Hermes, Qwen
    CallFormat(("[TOOL_CALLS]",), "[TOOL_CALLS]", "", read_json_calls, opening="[TOOL_CALLS]", is_list=True),  # Mistral
    CallFormat(  # Llama 3.1
        ("ipython", '"parameters"'), "<|python_tag|>", "", read_json_calls, is_bare=True, arguments="parameters"
    ),
)
"""The formats that are read; a chat template has the first one whose texts it contains."""


def find_call_format(template: ChatTemplate) -> CallFormat | None:
    """The format of calls of a chat template; None if it is not known."""
    source, with_tools, _ = template.sources
    text = with_tools or source or ""
    return next((form for form in CALL_FORMATS if all(part in text for part in form.template)), None)


def read_tool_calls(text: str, form: CallFormat, tools: Tools = ()) -> list[dict[str, Any]]:
    """The calls in a text that begins with one, in OpenAI's form; none if they are not written as in the format."""
    between = rf"{re.escape(form.start)}(.*?){re.escape(form.end)}"
    parts = re.findall(between, text, re.DOTALL) if form.end else [text.removeprefix(form.start)]
    try:
        calls = [call for part in parts for call in form.read(part, form.arguments, tools)]
    except ValueError:
        return []
    return [write_call(name, arguments) for name, arguments in calls]


def read_required_calls(text: str, arguments: str) -> list[dict[str, Any]]:
    """The calls in a text that follows `build_call_schema`; none if it is cut off."""
    try:
        return [write_call(name, value) for name, value in read_json_calls(text, arguments, ())]
    except ValueError:
        return []


def write_call(name: str, arguments: Any) -> dict[str, Any]:
    """A call in OpenAI's form, whose arguments are JSON text."""
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return {
        "id": f"call_{uuid.uuid4().hex[:24]}",
        "type": "function",
        "function": {"name": name, "arguments": text},
    }


def build_call_schema(tools: Tools, name: str | None, form: CallFormat | None) -> dict[str, Any]:
    """The JSON schema of a call of one of the tools, or of a list of calls.

    Args:
        name: the only tool that may be called; None for any.
        form: the format of the model's calls; None if it is not known.

    Raises:
        ApiError: if there is no such tool, or a tool is not a function with a name and a schema.
    """
    functions = [function for function in iter_functions(tools) if name in (None, function["name"])]
    if not functions:
        known = ", ".join(function["name"] for function in iter_functions(tools))
        raise ApiError(400, f"tool_choice: {str(name)[:60]!r} is not one of the tools {known}", param="tool_choice")
    key, is_list = (form.arguments, form.is_list) if form else ("arguments", False)
    base = "#/items" if is_list else "#"
    calls = []
    for number, function in enumerate(functions):
        schema = {"type": "object", **(function.get("parameters") or {})}
        schema = move_references(schema, f"{base}/anyOf/{number}/properties/{key}")
        properties = {"name": {"const": function["name"]}, key: schema}
        required: dict[str, Any] = {"required": ["name", key], "additionalProperties": False}
        calls.append({"type": "object", "properties": properties, **required})
    return {"type": "array", "items": {"anyOf": calls}, "minItems": 1} if is_list else {"anyOf": calls}


def iter_functions(tools: Tools) -> Iterator[Mapping[str, Any]]:
    """The functions of tools.

    Raises:
        ApiError: if a tool is not a function with a name and a schema.
    """
    for tool in tools:
        function = tool.get("function")
        parameters = function.get("parameters") if isinstance(function, dict) else ()
        if not isinstance(parameters, dict | None) or not isinstance(function.get("name"), str):  # type: ignore
            message = (
                "tools: a tool is not of the form {'type': 'function', 'function': {'name': ..., 'parameters': ...}}"
            )
            raise ApiError(400, message, param="tools")
        yield function  # type: ignore[misc]


def move_references(schema: Any, place: str) -> Any:
    """A schema whose references to its own parts are right at another place in a larger one."""
    if isinstance(schema, list):
        return [move_references(value, place) for value in schema]
    if not isinstance(schema, dict):
        return schema
    moved = {key: move_references(value, place) for key, value in schema.items()}
    if isinstance(reference := schema.get("$ref"), str) and reference.startswith("#"):
        moved["$ref"] = place + reference[1:]
    return moved


def get_types(name: str, tools: Tools) -> dict[str, Any]:
    """The types of the arguments of a tool, by name; empty if its schema does not say."""
    for tool in tools:
        function = tool.get("function")
        if isinstance(function, dict) and function.get("name") == name:
            properties = (function.get("parameters") or {}).get("properties") or {}
            return {key: value.get("type") for key, value in properties.items() if isinstance(value, dict)}
    return {}


def parse_arguments(message: dict[str, Any]) -> dict[str, Any]:
    """A message whose calls have the arguments as objects, as templates expect them, not as JSON text.

    Raises:
        ApiError: if the arguments of a call are not a JSON object.
    """
    if not isinstance(calls := message.get("tool_calls"), list):
        return message
    return {**message, "tool_calls": [parse_call_arguments(call) for call in calls]}


def parse_call_arguments(call: Any) -> Any:
    """A call of a message with its arguments as an object."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(text := function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(text or "{}")
    except ValueError:
        arguments = None
    if not isinstance(arguments, dict):
        message = f"messages: tool_calls.function.arguments: {text[:60]!r} is not a JSON object"
        raise ApiError(400, message, param="messages")
    return {**call, "function": {**function, "arguments": arguments}}
