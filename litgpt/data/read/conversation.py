"""Rows of every usual format as conversations: messages, ShareGPT, Alpaca, question and answer, plain text."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from litgpt.data.read.fields import (
    BadRow,
    check_text,
    dump_json,
    dump_tool_call,
    dump_tools,
    parse_channel,
    parse_loss,
    parse_value,
    parse_weight,
)

Format = Literal["auto", "messages", "alpaca", "query-response", "text", "instruction"]
RowMapping = Mapping[str, Any]

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "tool_call": "tool_call",
    "function_call": "tool_call",
    "tool": "tool",
    "tool_response": "tool",
    "observation": "tool",
    "function_response": "tool",
    "function": "tool",
}
"""The names of roles in use, and ours for each."""

QUERY = ("query", "prompt", "input", "instruction", "question", "problem")
RESPONSE = (
    "response",
    "answer",
    "output",
    "targets",
    "target",
    "answer_key",
    "answers",
    "solution",
    "text",
    "completion",
    "content",
)
COLUMN_NAMES = {
    "messages": ("messages", "conversation", "conversations"),
    "query": QUERY,
    "response": RESPONSE,
    "system": ("system", "system_prompt"),
    "history": ("history",),
    "tools": ("tools",),
    "channel": ("channel",),
    "weight": ("weight",),
}
"""Our columns, and the names that each goes by; the first name is ours."""


@dataclass(frozen=True)
class Message:
    """One message.

    Attributes:
        role: system, user, assistant, tool_call or tool.
        content: the text; of a tool_call, JSON with `name` and `arguments`, as the row spelled it.
        loss: whether it is trained; None: as the run's settings say.
        weight: multiplies the loss of its tokens.
        reasoning: what an assistant thought before its answer, where the row keeps that apart.
        context: what an instruction is about, where the row keeps that apart and it is to stay so.
    """

    role: str
    content: str
    loss: bool | None = None
    weight: float = 1.0
    reasoning: str = ""
    context: str = ""


@dataclass(frozen=True)
class Conversation:
    """What is said in one row.

    Attributes:
        messages: in order; the first system message is `system` instead.
        system: None where the row names none; an empty text asks for none.
        tools: a JSON list of the functions that may be called, as a text, so that storage cannot change it.
        channel: the row's own name for the group that its loss is reported in.
        weight: multiplies the loss of all its tokens.
    """

    messages: tuple[Message, ...]
    system: str | None = None
    tools: str | None = None
    channel: str | None = None
    weight: float = 1.0

    @property
    def is_text(self) -> bool:
        """Whether it is plain text to learn: one assistant message that answers nothing."""
        return len(self.messages) == 1 and self.messages[0].role == "assistant" and not self.system and not self.tools


def to_conversation(row: Any, columns: Mapping[str, str] | None = None, format: Format = "auto") -> Conversation:
    """The conversation in a row.

    Args:
        row: a mapping of column names, of which upper and lower case do not differ; null columns count as missing.
        columns: the row's name of a column, and the name that is meant.
        format: how to read it; auto tells by its columns.

    Raises:
        BadRow: with one reason.
    """
    if not isinstance(row, Mapping):
        raise BadRow("not an object", type(row).__name__)
    row = rename_columns(row, columns or {})
    if not row:
        raise BadRow("empty row")
    kind = detect_format(row) if format == "auto" else format
    conversation = FORMAT_READERS[kind](row)
    conversation = replace(
        conversation,
        tools=dump_tools(row.get("tools")) or conversation.tools,
        channel=parse_channel(row.get("channel")),
        weight=parse_weight(row.get("weight"), "weight"),
    )
    if not conversation.messages:
        raise BadRow("no messages")
    if conversation.messages[-1].role not in ("assistant", "tool_call"):
        raise BadRow("does not end with an answer", f"but with a message of role {conversation.messages[-1].role}")
    return conversation


def rename_columns(row: RowMapping, columns: Mapping[str, str]) -> dict[str, Any]:
    """A row without its null columns, under lower-case names, some of them renamed."""
    wanted = {theirs.lower(): ours.lower() for theirs, ours in columns.items()}
    found: dict[str, str] = {}
    values: dict[str, Any] = {}
    for theirs, value in row.items():
        if not isinstance(theirs, str):
            raise BadRow("column name is no text", repr(theirs)[:80])
        if value is None:
            continue
        ours = wanted.get(theirs.lower(), theirs.lower())
        if ours in found:
            raise BadRow("two columns for one", f"{found[ours]} and {theirs} are both {ours}")
        found[ours], values[ours] = theirs, value
    return values


def detect_format(row: RowMapping) -> Literal["messages", "alpaca", "query-response", "text"]:
    """How the columns of a row are to be read."""
    if any(name in row for name in COLUMN_NAMES["messages"]):
        return "messages"
    if "instruction" in row and "input" in row:
        return "alpaca"
    asks = any(name in row for name in (*QUERY, "history"))
    return "query-response" if asks or not any(name in row for name in RESPONSE) else "text"


def get_column(row: RowMapping, column: str) -> Any:
    """The value of the one column that goes by a name of `column`; None if there is none."""
    names = [name for name in COLUMN_NAMES[column] if name in row]
    if len(names) > 1:
        raise BadRow("two columns for one", f"{names[0]} and {names[1]} may both be the {column}; set columns")
    return row[names[0]] if names else None


def read_messages(row: RowMapping) -> Conversation:
    """A list of messages: OpenAI's, ShareGPT's or Anthropic's, or pairs of human and assistant."""
    items = parse_value(get_column(row, "messages"), "messages")
    if not isinstance(items, list | tuple):
        raise BadRow("messages are no list", type(items).__name__)
    found: list[Message] = []
    for item in items:
        found += parse_message(item)
    system = get_system(row)
    if found and found[0].role == "system":
        system, found = found[0].content, found[1:]
    return Conversation(tuple(found), system)


def read_alpaca(row: RowMapping) -> Conversation:
    """`instruction` and `input`, which are joined by a line end, and `output`."""
    parts = [check_text(row.get(name, ""), name) for name in ("instruction", "input")]
    answer = row["output"] if "output" in row else get_column(row, "response")
    return build_exchange(row, "\n".join(part for part in parts if part), answer)


def read_query(row: RowMapping) -> Conversation:
    """A question and its answer under any of their usual names, and the turns before."""
    query = get_column(row, "query")
    if query is None:
        raise BadRow("no messages", f"columns {', '.join(row)}"[:120])
    # an answer may be called `content` or `text` only where nothing else is called an answer
    strict = [name for name in RESPONSE if name in row and name not in ("text", "content")]
    answer = row[strict[0]] if len(strict) == 1 else get_column(row, "response")
    return build_exchange(row, check_text(query, "query"), answer)


def read_plain_text(row: RowMapping) -> Conversation:
    """Plain text."""
    text = check_text(take_first(get_column(row, "response")), "text")
    if not text:
        raise BadRow("empty text")
    return Conversation((Message("assistant", text),), get_system(row))


def read_instruction(row: RowMapping) -> Conversation:
    """LitGPT's rows: `instruction`, `output`, and perhaps `input`, which is left to the prompt style."""
    for name in ("instruction", "output"):
        if name not in row:
            raise BadRow(f"no {name}", f"columns {', '.join(row)}"[:120])
    question = Message(
        "user", check_text(row["instruction"], "instruction"), context=check_text(row.get("input", ""), "input")
    )
    return Conversation((question, Message("assistant", check_text(row["output"], "output"))), get_system(row))


FORMAT_READERS = {
    "messages": read_messages,
    "alpaca": read_alpaca,
    "query-response": read_query,
    "text": read_plain_text,
    "instruction": read_instruction,
}


def build_exchange(row: RowMapping, query: str, answer: Any) -> Conversation:
    """A question and an answer after the turns of `history`."""
    if not query:
        raise BadRow("empty question")
    if answer is None:
        raise BadRow("no answer")
    text = check_text(take_first(answer), "answer")
    if not text:
        raise BadRow("empty answer")
    turns = [Message("user", query), Message("assistant", text)]
    return Conversation((*parse_history(row.get("history")), *turns), get_system(row))


def parse_history(value: Any) -> list[Message]:
    """Earlier turns: a list of [question, answer]."""
    pairs = parse_value(value, "history") if value is not None else []
    if not isinstance(pairs, list | tuple):
        raise BadRow("history is no list of pairs", type(pairs).__name__)
    found: list[Message] = []
    for pair in pairs:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise BadRow("history is no list of pairs", repr(pair)[:80])
        found += [Message("user", check_text(pair[0], "history")), Message("assistant", check_text(pair[1], "history"))]
    return found


def take_first(value: Any) -> Any:
    """The first of several answers."""
    if isinstance(value, list | tuple):
        if not value:
            raise BadRow("empty answer", "a list of none")
        return value[0]
    return value


def get_system(row: RowMapping) -> str | None:
    """The system text of a row."""
    value = get_column(row, "system")
    return None if value is None else check_text(value, "system")


def parse_message(item: Any) -> list[Message]:
    """One entry of a list of messages, which may stand for several."""
    if not isinstance(item, Mapping):
        raise BadRow("message is no object", type(item).__name__)
    if "role" not in item and "from" not in item and "human" in item and "assistant" in item:
        return [
            Message("user", check_text(item["human"], "human")),
            Message("assistant", check_text(item["assistant"], "assistant")),
        ]
    role = parse_role(item)
    loss, weight = parse_loss(item.get("loss")), parse_weight(item.get("loss_scale", item.get("weight")), "loss_scale")
    reasoning = item.get("reasoning_content", item.get("thinking")) if role == "assistant" else None
    content = item.get("content", item.get("value"))
    calls = parse_value(item.get("tool_calls") or [], "tool_calls")
    if not isinstance(calls, list | tuple):
        raise BadRow("tool_calls is no list", type(calls).__name__)
    if content is None and not calls:
        raise BadRow("message without content", f"role {role}")
    if role == "tool_call":
        content = dump_tool_call(content)
    found = parse_content(content, role)
    found += [Message("tool_call", dump_tool_call(call)) for call in calls]
    if reasoning and found:
        found[0] = replace(found[0], reasoning=check_text(reasoning, "reasoning_content"))
    return [replace(message, loss=loss, weight=weight) for message in found]


def parse_role(item: RowMapping) -> str:
    """Our name of a message's role."""
    value = item.get("role", item.get("from"))
    if value is None:
        raise BadRow("message without a role", ", ".join(map(str, item))[:80])
    role = ROLES.get(value.lower()) if isinstance(value, str) else None
    if role is None:
        raise BadRow("unknown role", repr(value)[:80])
    return role


def parse_content(content: Any, role: str) -> list[Message]:
    """The messages in the content of one: a text, or a list of texts, tool calls and tool results."""
    if content is None:
        return []
    if not isinstance(content, list | tuple):
        text = dump_json(content) if role == "tool" and isinstance(content, Mapping) else check_text(content, "content")
        return [Message(role, text)]
    found: list[Message] = []
    for block in content:
        message = parse_block(block, role)
        if found and found[-1].role == message.role and message.role in ("system", "user", "assistant"):
            message = replace(message, content=found.pop().content + message.content)
        found.append(message)
    if not found:
        raise BadRow("message without content", f"role {role}")
    return found


def parse_block(block: Any, role: str) -> Message:
    """One block of a message."""
    if isinstance(block, str):
        return Message(role, check_text(block, "content"))
    kind = block.get("type") if isinstance(block, Mapping) else None
    if kind == "text":
        return Message(role, check_text(block.get("text"), "content"))
    if kind == "tool_use":
        return Message("tool_call", dump_tool_call({"name": block.get("name"), "arguments": block.get("input", {})}))
    if kind == "tool_result":
        inner = block.get("content", "")
        return Message("tool", "".join(part.content for part in parse_content(inner, "tool")) if inner else "")
    raise BadRow("content is no text", f"a block of type {kind!r}"[:80])


def iter_texts(conversations: Iterable[Conversation]) -> Iterable[str]:
    """What is said in conversations, message by message, to train a tokenizer on."""
    for conversation in conversations:
        for text in (conversation.system, *(message.content for message in conversation.messages)):
            if text:
                yield text
