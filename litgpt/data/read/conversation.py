"""Convert rows of the usual formats to conversations: messages, ShareGPT, Alpaca, question and answer, plain text."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from litgpt.data.read import fields
from litgpt.data.read.fields import BadRow, check_text, parse_value
from litgpt.data.read.media import MARKS, Medium
from litgpt.data.read.message import (
    Message,
    RowMapping,
    build_pair,
    list_fields,
    parse_message,
)
from litgpt.data.read.objects import OBJECTS_COLUMN, Objects, has_object_tags, parse_objects
from litgpt.data.read.row_media import attach_media, list_media_sources

Format = Literal["auto", "messages", "alpaca", "query-response", "text", "instruction"]

QUERY = ("query", "prompt", "input", "instruction", "question", "problem")
RESPONSE = (
    *("response", "answer", "output", "targets", "target", "answer_key"),
    *("answers", "solution", "text", "completion", "content"),
)
TEXT_COLUMNS = ("text", "content")
"""The columns of RESPONSE that may also be a text without a question."""
COLUMN_NAMES = {
    "messages": ("messages", "conversation", "conversations", "chosen_messages"),
    "query": QUERY,
    "response": RESPONSE,
    "system": ("system", "system_prompt"),
    "tools": ("tools", "functions"),
}
"""Aliases of each column."""
PREFERENCE_COLUMNS = (("chosen", "rejected"), ("rejected_response",), ("rejected_messages",))
"""Columns that only rows of preferences have."""


@dataclass(frozen=True)
class Conversation:
    """The conversation in one row.

    Attributes:
        messages: in order, without the first system message.
        system: the system message; None if the row has none; an empty text asks for none.
        tools: the functions that may be called, as a JSON list in text form, so that storing it changes nothing.
        channel: the group that the loss of this row is reported in.
        weight: factor of the loss of all tokens.
        unread: names of the columns of the row that nothing reads, and of fields that were lost on the way.
        objects: in its images, for which its texts have tags.
    """

    messages: tuple[Message, ...]
    system: str | None = None
    tools: str | None = None
    channel: str | None = None
    weight: float = 1.0
    unread: tuple[str, ...] = ()
    objects: Objects | None = None

    @property
    def is_text(self) -> bool:
        """Whether it is plain text: a single assistant message without a question."""
        return len(self.messages) == 1 and self.messages[0].role == "assistant" and not self.system and not self.tools

    @property
    def media(self) -> tuple[Medium, ...]:
        """The images, videos and sounds of all messages, in order."""
        return tuple(medium for message in self.messages for medium in message.media)

    @property
    def images(self) -> tuple[Medium, ...]:
        """The images among them."""
        return tuple(medium for medium in self.media if medium.kind == "image")


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
    given, row = row, TrackedRow(rename_columns(row, columns or {}))
    if not row:
        raise BadRow("empty row")
    detected = detect_format(row) if format == "auto" else format
    if detected == "text" and not any(name in row for name in TEXT_COLUMNS):
        check_question(given, columns or {})
    check_supported(row, detected)
    row.names_read.clear()
    conversation = FORMAT_READERS[detected](row)
    conversation = replace(
        conversation,
        messages=attach_media(conversation.messages, list_media_sources(row)) if conversation.messages else (),
        tools=fields.dump_tools(get_column(row, "tools")),
        channel=fields.parse_channel(row.get("channel")),
        weight=fields.parse_weight(row.get("weight"), "weight"),
    )
    if has_object_tags(conversation.messages) and row.get(OBJECTS_COLUMN):
        parsed = parse_objects(row[OBJECTS_COLUMN], conversation.messages, len(conversation.images))
        conversation = replace(conversation, objects=parsed)
    # empty values lose nothing, and renamed columns are known to the user
    ignored = row.names_read | {name.lower() for name in (columns or {}).values()}
    unread = [name for name, value in row.items() if name not in ignored and value not in ("", [], {})]
    conversation = replace(conversation, unread=(*unread, *conversation.unread))
    if not conversation.messages:
        raise BadRow("no messages")
    if conversation.messages[-1].role not in ("assistant", "tool_call"):
        raise BadRow("does not end with an answer", f"the last message has role {conversation.messages[-1].role}")
    return conversation


class TrackedRow(dict[str, Any]):
    """A row that remembers the names of the columns whose values were read."""

    def __init__(self, values: RowMapping) -> None:
        super().__init__(values)
        self.names_read: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        self.names_read.add(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        """Return the value of a column, or the default if there is none."""
        self.names_read.add(name)
        return super().get(name, default)


def check_supported(row: RowMapping, format: str) -> None:
    """Check that a row is not one of preferences.

    A row of questions and answers whose `label` is true or false is one of preferences (KTO); other labels are columns
    that nothing reads.

    Raises:
        BadRow: naming the column, and what to change to train on the row without it.
    """
    reason = "preference row; use litgpt align with data: Preferences"
    for names in PREFERENCE_COLUMNS:
        if all(name in row for name in names):
            unused = {names[-1]: "unused"}
            if "chosen" in names and not any(name in row for name in COLUMN_NAMES["messages"]):
                unused |= {"chosen": find_chosen_column(row)}
            mapping = ", ".join(f"{name}: {other}" for name, other in sorted(unused.items()))
            raise BadRow(
                reason,
                f"{' and '.join(names)}; or columns: {{{mapping}}} trains on the chosen answers",
            )
    if format != "text" and isinstance(row.get("label"), bool):
        raise BadRow(reason, "label; or columns: {label: unused} trains on all answers")


def find_chosen_column(row: RowMapping) -> str:
    """Find the column that the `chosen` of a preference row corresponds to."""
    chosen = row["chosen"]
    first = chosen[0] if isinstance(chosen, list | tuple) and chosen else None
    if isinstance(first, Mapping) and first.get("role", first.get("from")) not in ("assistant", "gpt"):
        return "messages"
    return "response" if any(name in row for name in QUERY) else "text" if isinstance(chosen, str) else "messages"


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


def check_question(row: RowMapping, columns: Mapping[str, str]) -> None:
    """Check that a row with an answer has no column for a question that is null; raises a BadRow if it has."""
    new_names = {old.lower(): new.lower() for old, new in columns.items()}
    for column, value in row.items():
        if value is None and new_names.get(column.lower(), column.lower()) in QUERY:
            raise BadRow("no question", f"{column} is null")


def detect_format(row: RowMapping) -> Literal["messages", "alpaca", "query-response", "text"]:
    """Detect the format of a row from its columns."""
    if any(name in row for name in COLUMN_NAMES["messages"]):
        return "messages"
    if "instruction" in row and get_input_name(row) in row:
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
    return build_conversation(row, parse_messages(items))


def parse_messages(items: Iterable[Any]) -> list[Message]:
    """Parse the entries of a list of messages."""
    return [message for item in items for message in parse_message(item)]


def build_conversation(row: RowMapping, messages: list[Message]) -> Conversation:
    """Build a conversation, whose first message may be the system message."""
    system = get_system(row)
    if not messages or messages[0].role != "system":
        return Conversation(tuple(messages), system)
    first, *rest = messages
    if first.media:
        raise BadRow(f"{first.media[0].kind} in the system message is not supported", "move it to a question")
    lost = [*(["system"] if system not in (None, first.content) else []), *list_fields([first])]
    return Conversation(tuple(rest), first.content, unread=tuple(lost))


def read_alpaca(row: RowMapping) -> Conversation:
    """Read `instruction` and `input`, joined by a newline, and `output`."""
    parts = [check_text(row.get(name, ""), name) for name in ("instruction", get_input_name(row))]
    answer = row["output"] if "output" in row else get_column(row, "response")
    return build_exchange(row, "\n".join(part for part in parts if part), answer)


def get_input_name(row: RowMapping) -> str:
    """Return the column of an instruction's input: `input`, or `context` without one, as Dolly names it."""
    return "context" if "input" not in row and isinstance(row.get("context"), str) else "input"


def read_query(row: RowMapping) -> Conversation:
    """Read a question and its answer under any of their usual names, and the turns before them."""
    query = get_column(row, "query")
    if query is None:
        raise BadRow("no messages", f"columns {', '.join(row)}"[:120])
    # `content` and `text` name an answer only if no other column does
    specific = [name for name in RESPONSE if name in row and name not in TEXT_COLUMNS]
    answer = row[specific[0]] if len(specific) == 1 else get_column(row, "response")
    if is_message_list(query) or is_message_list(answer):
        return build_prompt_completion(row, query, answer)
    return build_exchange(row, check_text(query, "query"), answer)


def is_message_list(value: Any) -> bool:
    """Whether a value is a list of messages."""
    return isinstance(value, list | tuple) and bool(value) and all(isinstance(item, Mapping) for item in value)


def build_prompt_completion(row: RowMapping, prompt: Any, completion: Any) -> Conversation:
    """Build a conversation of a prompt and a completion, of which at least one is a list of messages, as TRL has them.

    Answers in the prompt are not trained, unless they set `loss`.
    """
    before = parse_messages(prompt) if is_message_list(prompt) else [Message("user", check_text(prompt, "query"))]
    before = [
        replace(message, loss=False) if message.loss is None and message.role in ("assistant", "tool_call") else message
        for message in before
    ]
    if completion is None:
        raise BadRow("no answer")
    if is_message_list(completion):
        after = parse_messages(completion)
    else:
        after = [Message("assistant", check_text(take_first(completion), "answer"))]
    return build_conversation(row, [*parse_history(row.get("history")), *before, *after])


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
        "user",
        check_text(row["instruction"], "instruction"),
        context=check_text(row.get(get_input_name(row), ""), "input"),
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
    turns = [*parse_history(row.get("history")), Message("user", query), Message("assistant", text)]
    lost = ("answers after the first",) if isinstance(answer, list | tuple) and len(answer) > 1 else ()
    return Conversation(tuple(turns), get_system(row), unread=lost)


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


def iter_texts(conversations: Iterable[Conversation]) -> Iterable[str]:
    """Iterate over the texts of conversations, message by message, for training a tokenizer."""
    for conversation in conversations:
        for text in (conversation.system, *(message.content for message in conversation.messages)):
            if text:
                yield MARKS.sub("", text)
