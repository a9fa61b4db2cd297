"""Convert rows of the usual formats to conversations: messages, ShareGPT, Alpaca, question and answer, plain text."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from litgpt.data.read import fields
from litgpt.data.read.fields import BadRow, check_text, parse_value

Format = Literal["auto", "messages", "alpaca", "query-response", "text", "instruction"]
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
QUERY = ("query", "prompt", "input", "instruction", "question", "problem")
RESPONSE = (
    *("response", "answer", "output", "targets", "target", "answer_key"),
    *("answers", "solution", "text", "completion", "content"),
)
COLUMN_NAMES = {
    "messages": ("messages", "conversation", "conversations"),
    "query": QUERY,
    "response": RESPONSE,
    "system": ("system", "system_prompt"),
}
"""Aliases of each column."""


@dataclass(frozen=True)
class Message:
    """One message.

    Attributes:
        role: system, user, assistant, tool_call or tool.
        content: the text; for a tool_call, JSON with `name` and `arguments`, as spelled in the row.
        loss: whether it is trained; None for the default of the run.
        weight: factor of the loss of its tokens.
        reasoning: the assistant's reasoning before the answer, if the row has it as a separate field.
        context: the `input` of an instruction, which prompt styles write apart.
    """

    role: str
    content: str
    loss: bool | None = None
    weight: float = 1.0
    reasoning: str = ""
    context: str = ""


@dataclass(frozen=True)
class Conversation:
    """The conversation in one row.

    Attributes:
        messages: in order, without the first system message.
        system: the system message; None if the row has none; an empty text asks for none.
        tools: the functions that may be called, as a JSON list in text form, so that storing it changes nothing.
        channel: the group that the loss of this row is reported in.
        weight: factor of the loss of all tokens.
    """

    messages: tuple[Message, ...]
    system: str | None = None
    tools: str | None = None
    channel: str | None = None
    weight: float = 1.0

    @property
    def is_text(self) -> bool:
        """Whether it is plain text: a single assistant message without a question."""
        return len(self.messages) == 1 and self.messages[0].role == "assistant" and not self.system and not self.tools


def to_conversation(row: Any, columns: Mapping[str, str] | None = None, format: Format = "auto") -> Conversation:
    """Convert a row to a conversation.

    Args:
        row: maps column names, which are case-insensitive, to values; null counts as missing.
        columns: renames columns, from the row's name to the expected name.
        format: how to read it; auto detects it from the columns.

    Raises:
        BadRow: with one reason.
    """
    if not isinstance(row, Mapping):
        raise BadRow("not an object", type(row).__name__)
    row = rename_columns(row, columns or {})
    if not row:
        raise BadRow("empty row")
    conversation = FORMAT_READERS[detect_format(row) if format == "auto" else format](row)
    conversation = replace(
        conversation,
        tools=fields.dump_tools(row.get("tools")) or conversation.tools,
        channel=fields.parse_channel(row.get("channel")),
        weight=fields.parse_weight(row.get("weight"), "weight"),
    )
    if not conversation.messages:
        raise BadRow("no messages")
    if conversation.messages[-1].role not in ("assistant", "tool_call"):
        raise BadRow("does not end with an answer", f"the last message has role {conversation.messages[-1].role}")
    return conversation


def rename_columns(row: RowMapping, columns: Mapping[str, str]) -> dict[str, Any]:
    """Drop null columns, convert names to lower case and rename some."""
    new_names = {old.lower(): new.lower() for old, new in columns.items()}
    sources: dict[str, str] = {}
    values: dict[str, Any] = {}
    for column, value in row.items():
        if not isinstance(column, str):
            raise BadRow("column name is not text", repr(column)[:80])
        if value is None:
            continue
        name = new_names.get(column.lower(), column.lower())
        if name in sources:
            raise BadRow("duplicate column", f"{sources[name]} and {column} are both {name}")
        sources[name], values[name] = column, value
    return values


def detect_format(row: RowMapping) -> Literal["messages", "alpaca", "query-response", "text"]:
    """Detect the format of a row from its columns."""
    if any(name in row for name in COLUMN_NAMES["messages"]):
        return "messages"
    if "instruction" in row and "input" in row:
        return "alpaca"
    has_query = any(name in row for name in (*QUERY, "history"))
    return "query-response" if has_query or not any(name in row for name in RESPONSE) else "text"


def get_column(row: RowMapping, column: str) -> Any:
    """Return the value of the column named `column` or one of its aliases; None without one."""
    names = [name for name in COLUMN_NAMES[column] if name in row]
    if len(names) > 1:
        raise BadRow("duplicate column", f"{names[0]} and {names[1]} are both names of {column}; set columns")
    return row[names[0]] if names else None


def read_messages(row: RowMapping) -> Conversation:
    """Read a list of messages in the format of OpenAI, ShareGPT or Anthropic, or pairs of human and assistant."""
    items = parse_value(get_column(row, "messages"), "messages")
    if not isinstance(items, list | tuple):
        raise BadRow("messages is not a list", type(items).__name__)
    messages = [message for item in items for message in parse_message(item)]
    system = get_system(row)
    if messages and messages[0].role == "system":
        system, messages = messages[0].content, messages[1:]
    return Conversation(tuple(messages), system)


def read_alpaca(row: RowMapping) -> Conversation:
    """Read `instruction` and `input`, joined by a newline, and `output`."""
    parts = [check_text(row.get(name, ""), name) for name in ("instruction", "input")]
    answer = row["output"] if "output" in row else get_column(row, "response")
    return build_exchange(row, "\n".join(part for part in parts if part), answer)


def read_query(row: RowMapping) -> Conversation:
    """Read a question and its answer under any of their usual names, and the turns before them."""
    query = get_column(row, "query")
    if query is None:
        raise BadRow("no messages", f"columns {', '.join(row)}"[:120])
    # `content` and `text` name an answer only if no other column does
    specific = [name for name in RESPONSE if name in row and name not in ("text", "content")]
    answer = row[specific[0]] if len(specific) == 1 else get_column(row, "response")
    return build_exchange(row, check_text(query, "query"), answer)


def read_plain_text(row: RowMapping) -> Conversation:
    """Read plain text."""
    text = check_text(take_first(get_column(row, "response")), "text")
    if not text:
        raise BadRow("empty text")
    return Conversation((Message("assistant", text),), get_system(row))


def read_instruction(row: RowMapping) -> Conversation:
    """Read LitGPT's rows: `instruction`, `output`, and optionally `input`, which the prompt style places."""
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
    """Build a conversation of the turns of `history`, a question and its answer."""
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
    """Parse earlier turns: a list of [question, answer]."""
    pairs = parse_value(value, "history") if value is not None else []
    if not isinstance(pairs, list | tuple):
        raise BadRow("history is not a list of pairs", type(pairs).__name__)
    messages: list[Message] = []
    for pair in pairs:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise BadRow("history is not a list of pairs", repr(pair)[:80])
        messages += build_pair(pair[0], pair[1], "history", "history")
    return messages


def build_pair(question: Any, answer: Any, question_name: str, answer_name: str) -> list[Message]:
    """Build the messages of a question and its answer; the names of their columns are for errors."""
    return [Message("user", check_text(question, question_name)), Message("assistant", check_text(answer, answer_name))]


def take_first(value: Any) -> Any:
    """Return the first of several answers."""
    if isinstance(value, list | tuple):
        if not value:
            raise BadRow("empty answer", "an empty list")
        return value[0]
    return value


def get_system(row: RowMapping) -> str | None:
    """Return the system message of a row."""
    value = get_column(row, "system")
    return None if value is None else check_text(value, "system")


def parse_message(item: Any) -> list[Message]:
    """Parse an entry of a list of messages, which may contain several."""
    if not isinstance(item, Mapping):
        raise BadRow("message is not an object", type(item).__name__)
    if "role" not in item and "from" not in item and "human" in item and "assistant" in item:
        return build_pair(item["human"], item["assistant"], "human", "assistant")
    role = parse_role(item)
    loss = fields.parse_loss(item.get("loss"))
    weight = fields.parse_weight(item.get("loss_scale", item.get("weight")), "loss_scale")
    reasoning = item.get("reasoning_content", item.get("thinking")) if role == "assistant" else None
    content = item.get("content", item.get("value"))
    calls = parse_value(item.get("tool_calls") or [], "tool_calls")
    if not isinstance(calls, list | tuple):
        raise BadRow("tool_calls is not a list", type(calls).__name__)
    if content is None and not calls:
        raise BadRow("message without content", f"role {role}")
    if role == "tool_call":
        content = fields.dump_tool_call(content)
    messages = parse_content(content, role)
    messages += [Message("tool_call", fields.dump_tool_call(call)) for call in calls]
    if reasoning and messages:
        messages[0] = replace(messages[0], reasoning=check_text(reasoning, "reasoning_content"))
    return [replace(message, loss=loss, weight=weight) for message in messages]


def parse_role(item: RowMapping) -> str:
    """Return the role of a message, without aliases."""
    value = item.get("role", item.get("from"))
    if value is None:
        raise BadRow("message without a role", ", ".join(map(str, item))[:80])
    role = ROLES.get(value.lower()) if isinstance(value, str) else None
    if role is None:
        raise BadRow("unknown role", repr(value)[:80])
    return role


def parse_content(content: Any, role: str) -> list[Message]:
    """Parse the content of a message: text, or a list of texts, tool calls and tool results."""
    if content is None:
        return []
    if not isinstance(content, list | tuple):
        is_json = role == "tool" and isinstance(content, Mapping)
        return [Message(role, fields.dump_json(content) if is_json else check_text(content, "content"))]
    messages: list[Message] = []
    for block in content:
        message = parse_block(block, role)
        if messages and messages[-1].role == message.role and message.role in ("system", "user", "assistant"):
            message = replace(message, content=messages.pop().content + message.content)
        messages.append(message)
    if not messages:
        raise BadRow("message without content", f"role {role}")
    return messages


def parse_block(block: Any, role: str) -> Message:
    """Parse one block of the content of a message."""
    if isinstance(block, str):
        return Message(role, check_text(block, "content"))
    kind = block.get("type") if isinstance(block, Mapping) else None
    if kind == "text":
        return Message(role, check_text(block.get("text"), "content"))
    if kind == "tool_use":
        call = {"name": block.get("name"), "arguments": block.get("input", {})}
        return Message("tool_call", fields.dump_tool_call(call))
    if kind == "tool_result":
        inner = block.get("content", "")
        return Message("tool", "".join(part.content for part in parse_content(inner, "tool")) if inner else "")
    raise BadRow("content is not text", f"a block of type {kind!r}"[:80])


def iter_texts(conversations: Iterable[Conversation]) -> Iterable[str]:
    """Iterate over the texts of conversations, message by message, for training a tokenizer."""
    for conversation in conversations:
        for text in (conversation.system, *(message.content for message in conversation.messages)):
            if text:
                yield text
