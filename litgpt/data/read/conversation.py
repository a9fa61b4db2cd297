"""Rows of every usual format as conversations: messages, ShareGPT, Alpaca, question and answer, plain text."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from litgpt.data.read.fields import BadRow, call_text, json_text, loss_of, name_of, parsed, text_of, tools_of, weight_of

Format = Literal["auto", "messages", "alpaca", "query-response", "text", "instruction"]
Row = Mapping[str, Any]

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
COLUMNS = {
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
    row = named(row, columns or {})
    if not row:
        raise BadRow("empty row")
    kind = format_of(row) if format == "auto" else format
    conversation = READERS[kind](row)
    conversation = replace(
        conversation,
        tools=tools_of(row.get("tools")) or conversation.tools,
        channel=name_of(row.get("channel")),
        weight=weight_of(row.get("weight"), "weight"),
    )
    if not conversation.messages:
        raise BadRow("no messages")
    if conversation.messages[-1].role not in ("assistant", "tool_call"):
        raise BadRow("does not end with an answer", f"but with a message of role {conversation.messages[-1].role}")
    return conversation


def named(row: Row, columns: Mapping[str, str]) -> dict[str, Any]:
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


def format_of(row: Row) -> Literal["messages", "alpaca", "query-response", "text"]:
    """How the columns of a row are to be read."""
    if any(name in row for name in COLUMNS["messages"]):
        return "messages"
    if "instruction" in row and "input" in row:
        return "alpaca"
    asks = any(name in row for name in (*QUERY, "history"))
    return "query-response" if asks or not any(name in row for name in RESPONSE) else "text"


def one_of(row: Row, column: str) -> Any:
    """The value of the one column that goes by a name of `column`; None if there is none."""
    names = [name for name in COLUMNS[column] if name in row]
    if len(names) > 1:
        raise BadRow("two columns for one", f"{names[0]} and {names[1]} may both be the {column}; set columns")
    return row[names[0]] if names else None


def read_messages(row: Row) -> Conversation:
    """A list of messages: OpenAI's, ShareGPT's or Anthropic's, or pairs of human and assistant."""
    items = parsed(one_of(row, "messages"), "messages")
    if not isinstance(items, list | tuple):
        raise BadRow("messages are no list", type(items).__name__)
    found: list[Message] = []
    for item in items:
        found += messages_of(item)
    system = system_of(row)
    if found and found[0].role == "system":
        system, found = found[0].content, found[1:]
    return Conversation(tuple(found), system)


def read_alpaca(row: Row) -> Conversation:
    """`instruction` and `input`, which are joined by a line end, and `output`."""
    parts = [text_of(row.get(name, ""), name) for name in ("instruction", "input")]
    answer = row["output"] if "output" in row else one_of(row, "response")
    return exchange(row, "\n".join(part for part in parts if part), answer)


def read_query(row: Row) -> Conversation:
    """A question and its answer under any of their usual names, and the turns before."""
    query = one_of(row, "query")
    if query is None:
        raise BadRow("no messages", f"columns {', '.join(row)}"[:120])
    # an answer may be called `content` or `text` only where nothing else is called an answer
    strict = [name for name in RESPONSE if name in row and name not in ("text", "content")]
    answer = row[strict[0]] if len(strict) == 1 else one_of(row, "response")
    return exchange(row, text_of(query, "query"), answer)


def read_text(row: Row) -> Conversation:
    """Plain text."""
    text = text_of(first_of(one_of(row, "response")), "text")
    if not text:
        raise BadRow("empty text")
    return Conversation((Message("assistant", text),), system_of(row))


def read_instruction(row: Row) -> Conversation:
    """LitGPT's rows: `instruction`, `output`, and perhaps `input`, which is left to the prompt style."""
    for name in ("instruction", "output"):
        if name not in row:
            raise BadRow(f"no {name}", f"columns {', '.join(row)}"[:120])
    question = Message(
        "user", text_of(row["instruction"], "instruction"), context=text_of(row.get("input", ""), "input")
    )
    return Conversation((question, Message("assistant", text_of(row["output"], "output"))), system_of(row))


READERS = {
    "messages": read_messages,
    "alpaca": read_alpaca,
    "query-response": read_query,
    "text": read_text,
    "instruction": read_instruction,
}


def exchange(row: Row, query: str, answer: Any) -> Conversation:
    """A question and an answer after the turns of `history`."""
    if not query:
        raise BadRow("empty question")
    if answer is None:
        raise BadRow("no answer")
    text = text_of(first_of(answer), "answer")
    if not text:
        raise BadRow("empty answer")
    turns = [Message("user", query), Message("assistant", text)]
    return Conversation((*history_of(row.get("history")), *turns), system_of(row))


def history_of(value: Any) -> list[Message]:
    """Earlier turns: a list of [question, answer]."""
    pairs = parsed(value, "history") if value is not None else []
    if not isinstance(pairs, list | tuple):
        raise BadRow("history is no list of pairs", type(pairs).__name__)
    found: list[Message] = []
    for pair in pairs:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise BadRow("history is no list of pairs", repr(pair)[:80])
        found += [Message("user", text_of(pair[0], "history")), Message("assistant", text_of(pair[1], "history"))]
    return found


def first_of(value: Any) -> Any:
    """The first of several answers."""
    if isinstance(value, list | tuple):
        if not value:
            raise BadRow("empty answer", "a list of none")
        return value[0]
    return value


def system_of(row: Row) -> str | None:
    """The system text of a row."""
    value = one_of(row, "system")
    return None if value is None else text_of(value, "system")


def messages_of(item: Any) -> list[Message]:
    """One entry of a list of messages, which may stand for several."""
    if not isinstance(item, Mapping):
        raise BadRow("message is no object", type(item).__name__)
    if "role" not in item and "from" not in item and "human" in item and "assistant" in item:
        return [
            Message("user", text_of(item["human"], "human")),
            Message("assistant", text_of(item["assistant"], "assistant")),
        ]
    role = role_of(item)
    loss, weight = loss_of(item.get("loss")), weight_of(item.get("loss_scale", item.get("weight")), "loss_scale")
    reasoning = item.get("reasoning_content", item.get("thinking")) if role == "assistant" else None
    content = item.get("content", item.get("value"))
    calls = parsed(item.get("tool_calls") or [], "tool_calls")
    if not isinstance(calls, list | tuple):
        raise BadRow("tool_calls is no list", type(calls).__name__)
    if content is None and not calls:
        raise BadRow("message without content", f"role {role}")
    if role == "tool_call":
        content = call_text(content)
    found = blocks_of(content, role)
    found += [Message("tool_call", call_text(call)) for call in calls]
    if reasoning and found:
        found[0] = replace(found[0], reasoning=text_of(reasoning, "reasoning_content"))
    return [replace(message, loss=loss, weight=weight) for message in found]


def role_of(item: Row) -> str:
    """Our name of a message's role."""
    value = item.get("role", item.get("from"))
    if value is None:
        raise BadRow("message without a role", ", ".join(map(str, item))[:80])
    role = ROLES.get(value.lower()) if isinstance(value, str) else None
    if role is None:
        raise BadRow("unknown role", repr(value)[:80])
    return role


def blocks_of(content: Any, role: str) -> list[Message]:
    """The messages in the content of one: a text, or a list of texts, tool calls and tool results."""
    if content is None:
        return []
    if not isinstance(content, list | tuple):
        text = json_text(content) if role == "tool" and isinstance(content, Mapping) else text_of(content, "content")
        return [Message(role, text)]
    found: list[Message] = []
    for block in content:
        message = block_of(block, role)
        if found and found[-1].role == message.role and message.role in ("system", "user", "assistant"):
            message = replace(message, content=found.pop().content + message.content)
        found.append(message)
    if not found:
        raise BadRow("message without content", f"role {role}")
    return found


def block_of(block: Any, role: str) -> Message:
    """One block of a message."""
    if isinstance(block, str):
        return Message(role, text_of(block, "content"))
    kind = block.get("type") if isinstance(block, Mapping) else None
    if kind == "text":
        return Message(role, text_of(block.get("text"), "content"))
    if kind == "tool_use":
        return Message("tool_call", call_text({"name": block.get("name"), "arguments": block.get("input", {})}))
    if kind == "tool_result":
        inner = block.get("content", "")
        return Message("tool", "".join(part.content for part in blocks_of(inner, "tool")) if inner else "")
    raise BadRow("content is no text", f"a block of type {kind!r}"[:80])


def texts_of(conversations: Iterable[Conversation]) -> Iterable[str]:
    """What is said in conversations, message by message, to train a tokenizer on."""
    for conversation in conversations:
        for text in (conversation.system, *(message.content for message in conversation.messages)):
            if text:
                yield text
