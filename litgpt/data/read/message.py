"""Parse the messages of a conversation: their roles, contents, calls, and the other fields that templates read."""

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from litgpt.data.read import fields
from litgpt.data.read.fields import BadRow, check_text, parse_value
from litgpt.data.read.media import KINDS_OF_BLOCKS, MEDIA_KINDS, Medium, parse_medium_block

RowMapping = Mapping[str, Any]

ROLE_NAMES = {
    "system": ("system", "developer"),
    "user": ("user", "human"),
    "assistant": ("assistant", "gpt", "bot", "model"),
    "tool_call": ("tool_call", "function_call"),
    "tool": ("tool", "tool_response", "observation", "function_response", "function"),
}
"""Aliases of each role."""
ROLES = {name: role for role, names in ROLE_NAMES.items() for name in names}
PAIRS = (("human", "assistant"), ("user", "assistant"))
"""Keys of messages that hold a question and its answer."""
UNREAD_BLOCKS = ("file", "document")
"""Types of blocks of a content that are neither text nor media."""
MEDIA_FIELDS = tuple(name for kind in MEDIA_KINDS.values() for name in kind.columns)
"""Columns of rows, and fields of messages, that are not text."""
PARSED_FIELDS = {
    *("role", "from", "content", "value", "loss", "loss_scale", "weight", "loss_weight"),
    *("tool_calls", "function_call"),
}
"""Fields of a message that `parse_message` parses; all others are kept for templates."""


@dataclass(frozen=True)
class Message:
    """One message.

    Attributes:
        role: system, user, assistant, tool_call or tool.
        content: the text; for a tool_call, JSON with `name` and `arguments`, as spelled in the row.
        loss: whether it is trained; None for the default of the run.
        weight: factor of the loss of its tokens.
        context: the `input` of an instruction, which prompt styles write apart.
        media: the images, videos and sounds in it, in the order of their marks in the content.
        fields: the other fields of the message or the call, such as `name` and `id`, which templates may read. For a
            tool_call, those of its function are in `function`. `content: None` is an answer of calls only.
    """

    role: str
    content: str
    loss: bool | None = None
    weight: float = 1.0
    context: str = ""
    media: tuple[Medium, ...] = ()
    fields: Mapping[str, Any] = field(default_factory=dict)


def list_fields(messages: Iterable[Message]) -> list[str]:
    """List the names of the fields of messages and calls that only templates read, as paths in the row."""
    names: dict[str, None] = {}
    for message in messages:
        is_call = message.role == "tool_call"
        prefix, parsed = ("messages.tool_calls.", ("type", "function")) if is_call else ("messages.", ("content",))
        names |= {prefix + name: None for name in message.fields if name not in parsed}
        if is_call:
            names |= {f"{prefix}function.{name}": None for name in message.fields.get("function", {})}
    return list(names)


def remove_fields(message: Message, names: Container[str]) -> Message:
    """Remove fields, given as paths in the row, from a message or a call."""
    prefix = "messages.tool_calls." if message.role == "tool_call" else "messages."
    kept = {name: value for name, value in message.fields.items() if prefix + name not in names}
    if "function" in kept and message.role == "tool_call":
        inner = {name: value for name, value in kept["function"].items() if f"{prefix}function.{name}" not in names}
        kept["function"] = inner
    return replace(message, fields=kept)


def parse_message(item: Any) -> list[Message]:
    """Parse an entry of a list of messages, which may contain several; null fields count as missing.

    Raises:
        BadRow: with one reason.
    """
    if not isinstance(item, Mapping):
        raise BadRow("message is not an object", type(item).__name__)
    item = {str(name): value for name, value in item.items() if value is not None}
    pair = next((pair for pair in PAIRS if set(pair) <= set(item)), None)
    if pair and "role" not in item and "from" not in item:
        return build_pair(item[pair[0]], item[pair[1]], *pair)
    role = parse_role(item)
    check_media(item, "message")
    loss, weight = parse_training(item, role)
    calls = parse_calls(item)
    content = item.get("content", item.get("value"))
    if isinstance(content, list | tuple) and not content and calls:
        content = None
    if content is None and not calls:
        raise BadRow("message without content", f"role {role}")
    rest = fields.to_json_values({name: value for name, value in item.items() if name not in PARSED_FIELDS})
    if role == "tool_call":
        messages = [parse_call(content)]
    elif content is None:
        messages = [Message(role, "", fields={"content": None})]
    else:
        messages = parse_content(content, role)
    if rest and role == "assistant" and messages[0].role == "tool_call":
        messages.insert(0, Message(role, "", fields={"content": None}))
    messages[0] = replace(messages[0], fields={**messages[0].fields, **rest})
    return [replace(message, loss=loss, weight=weight) for message in [*messages, *map(parse_call, calls)]]


def parse_training(item: RowMapping, role: str) -> tuple[bool | None, float]:
    """Parse whether a message is trained, None for the default of the run, and the factor of its loss.

    `loss_weight`, as LLaMA-Factory names it, is both: it trains questions, or not an answer.
    """
    loss = fields.parse_loss(item.get("loss"))
    name = next((name for name in ("loss_scale", "weight", "loss_weight") if name in item), "loss_scale")
    weight = fields.parse_weight(item.get(name), name)
    if name == "loss_weight" and loss is None:
        is_answer = role in ("assistant", "tool_call")
        loss = None if is_answer == (weight > 0) else weight > 0
        weight = weight or 1.0
    return loss, weight


def parse_role(item: RowMapping) -> str:
    """Return the role of a message, without aliases."""
    value = item.get("role", item.get("from"))
    if value is None:
        raise BadRow("message without a role", ", ".join(map(str, item))[:80])
    role = ROLES.get(value.lower()) if isinstance(value, str) else None
    if role is None:
        raise BadRow("unknown role", repr(value)[:80])
    return role


def check_media(values: RowMapping, where: str) -> None:
    """Check that a row or a message has no images, videos or audio, which would be left out of the text.

    Args:
        where: what the values belong to, for the error.

    Raises:
        BadRow: naming the field.
    """
    for name in MEDIA_FIELDS:
        if values.get(name):
            kind = name.rstrip("s")
            raise BadRow(f"{kind} data is not supported yet", f"{where}.{name}; remove it to train on the text alone")


def parse_calls(item: RowMapping) -> list[Any]:
    """Return the calls in a message: its `tool_calls`, or its only call in `function_call`, as OpenAI once named it."""
    calls = parse_value(item.get("tool_calls") or [], "tool_calls")
    if not isinstance(calls, list | tuple):
        raise BadRow("tool_calls is not a list", type(calls).__name__)
    return [*calls, *([item["function_call"]] if item.get("function_call") else [])]


def parse_call(value: Any) -> Message:
    """Parse a tool call: an object or JSON with `name` and `arguments`, in itself or in its `function`."""
    text, rest = fields.dump_tool_call(value)
    return Message("tool_call", text, fields=rest)


def parse_content(content: Any, role: str) -> list[Message]:
    """Parse the content of a message: text, or a list of texts, reasoning, tool calls and tool results."""
    if not isinstance(content, list | tuple):
        is_json = role == "tool" and isinstance(content, Mapping)
        return [Message(role, fields.dump_json(content) if is_json else check_text(content, "content"))]
    messages: list[Message] = []
    for block in content:
        message = parse_block(block, role)
        if messages and messages[-1].role == message.role and message.role in ("system", "user", "assistant"):
            before = messages.pop()
            thinking = [part.fields["thinking"] for part in (before, message) if part.fields]
            content_fields = {"thinking": "".join(thinking)} if thinking else {}
            content, media = before.content + message.content, before.media + message.media
            message = replace(message, content=content, media=media, fields=content_fields)
        messages.append(message)
    if not messages:
        raise BadRow("message without content", f"role {role}")
    return messages


def parse_block(block: Any, role: str) -> Message:
    """Parse one block of the content of a message."""
    if isinstance(block, str):
        return Message(role, check_text(block, "content"))
    kind = block.get("type") if isinstance(block, Mapping) else None
    if kind in ("text", "input_text", "output_text"):
        return Message(role, check_text(block.get("text", block.get("value")), "content"))
    if kind in ("thinking", "reasoning") and role == "assistant":
        inner = parse_content(block.get("thinking", block.get("value")), role)
        return Message(role, "", fields={"thinking": "".join(part.content for part in inner)})
    if kind == "tool_use":
        call = {"name": block.get("name"), "arguments": block.get("input", {})}
        return parse_call(call if block.get("id") is None else {"id": block["id"], **call})
    if kind == "tool_call":
        return parse_call(block.get("value"))
    if kind == "tool_result":
        inner = parse_content(block.get("content") or "", "tool")
        call_id = block.get("tool_use_id")
        rest = {} if call_id is None else fields.to_json_values({"tool_call_id": call_id})
        media = tuple(medium for part in inner for medium in part.media)
        return Message("tool", "".join(part.content for part in inner), media=media, fields=rest)
    if (medium_kind := KINDS_OF_BLOCKS.get(str(kind))) is not None:
        return Message(role, MEDIA_KINDS[medium_kind].mark, media=(parse_medium_block(block, medium_kind),))
    if kind in UNREAD_BLOCKS:
        raise BadRow(f"{kind} data is not supported yet", "message.content; remove it to train on the text alone")
    raise BadRow("content is not text", f"a block of type {kind!r}"[:80])


def build_pair(question: Any, answer: Any, question_name: str, answer_name: str) -> list[Message]:
    """Build the messages of a question and its answer; the names of their columns are for errors."""
    return [Message("user", check_text(question, question_name)), Message("assistant", check_text(answer, answer_name))]
