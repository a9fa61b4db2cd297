"""Convert rows of the usual formats to preferences: two answers that are compared, or one that is rated."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from litgpt.data.read.conversation import (
    COLUMN_NAMES,
    PREFERENCE_COLUMNS,
    QUERY,
    Conversation,
    get_column,
    is_message_list,
    parse_messages,
    rename_columns,
    to_conversation,
)
from litgpt.data.read.fields import BadRow, parse_value
from litgpt.data.read.message import Message, RowMapping, check_media

PreferenceKind = Literal["pairs", "rated"]
SHARED_COLUMNS = ("history", *COLUMN_NAMES["system"], *COLUMN_NAMES["tools"], "channel", "weight")
"""Columns that belong to both answers."""
ANSWER_COLUMNS = {"chosen", "rejected", "rejected_response", "rejected_messages", "margin", "label"}
ANSWER_ROLES = ("assistant", "tool_call")


@dataclass(frozen=True)
class Preference(Conversation):
    """A conversation whose last answers are preferred to those of another, or are rated.

    Attributes:
        rejected: the other conversation; None for one that is rated.
        value: the margin of the preference; of one that is rated, 1 if it is desirable, and 0 if not.
    """

    rejected: Conversation | None = None
    value: float = 0.0


def has_pair(row: Any) -> bool:
    """Whether a row has two answers."""
    names = {str(name).lower() for name in row} if isinstance(row, Mapping) else set[str]()
    return any(names.issuperset(columns) for columns in PREFERENCE_COLUMNS)


def to_preferences(row: Any, columns: Mapping[str, str] | None, kind: PreferenceKind) -> list[Preference]:
    """Convert a row to preferences of a kind: one, or two rated ones for a pair.

    Args:
        row: maps column names, which are case-insensitive, to values; null counts as missing.
        columns: renames columns, from the row's name to the expected name.

    Raises:
        BadRow: with one reason.
    """
    if not isinstance(row, Mapping):
        raise BadRow("not an object", type(row).__name__)
    row = rename_columns(row, columns or {})
    check_media(row, "row")
    if not has_pair(row):
        if kind == "pairs":
            detail = "rows with a label are for litgpt kto" if "label" in row else f"columns {', '.join(row)}"[:120]
            raise BadRow("not two answers: no chosen and rejected", detail)
        return [rate_conversation(row)]
    pair = build_preference(row)
    if kind == "pairs":
        return [pair]
    assert pair.rejected is not None
    chosen, rejected = vars(pair) | {"rejected": None, "value": 1.0}, vars(pair.rejected)
    return [Preference(**chosen), Preference(**rejected, value=0.0)]


def rate_conversation(row: RowMapping) -> Preference:
    """Build a rated conversation of a row with a `label`."""
    label = row.get("label")
    if label not in (True, False, 0, 1):
        raise BadRow("no label of true or false", repr(label)[:80])
    conversation = to_conversation({name: value for name, value in row.items() if name != "label"})
    return Preference(**vars(mask_answers(conversation, len(conversation.messages) - 1)), value=float(label))


def build_preference(row: RowMapping) -> Preference:
    """Build the preference of a row with two answers."""
    first, second = build_conversations(row)
    if first.messages == second.messages:
        raise BadRow("identical answers")
    common = count_common(first.messages, second.messages)
    chosen, rejected = mask_answers(first, common), mask_answers(second, common)
    read = {*ANSWER_COLUMNS, *SHARED_COLUMNS, *COLUMN_NAMES["messages"], *QUERY}
    if "chosen" not in row:
        read |= {*COLUMN_NAMES["response"]}
    unread = [name for name, value in row.items() if name not in read and value not in ("", [], {})]
    chosen = replace(chosen, unread=tuple(dict.fromkeys([*unread, *chosen.unread, *rejected.unread])))
    return Preference(**vars(chosen), rejected=rejected, value=parse_margin(row.get("margin")))


def parse_margin(value: Any) -> float:
    """Parse the margin of a preference, 0 if there is none."""
    if value is None:
        return 0.0
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise BadRow("margin is not a number", repr(value)[:80])
    return float(value)


def count_common(first: tuple[Message, ...], second: tuple[Message, ...]) -> int:
    """Number of messages that two conversations have in common at their start."""
    pairs = zip(first, second, strict=False)
    return next((index for index, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


def mask_answers(conversation: Conversation, end: int) -> Conversation:
    """Do not train the answers before a message, unless they set `loss`."""
    messages = [
        replace(message, loss=False)
        if index < end and message.loss is None and message.role in ANSWER_ROLES
        else message
        for index, message in enumerate(conversation.messages)
    ]
    return replace(conversation, messages=tuple(messages))


def build_conversations(row: RowMapping) -> tuple[Conversation, Conversation]:
    """Build the conversations of the preferred answer and of the other one."""
    shared = {name: row[name] for name in SHARED_COLUMNS if name in row}
    if "chosen" in row and "rejected" in row:
        first, second = (to_conversation(build_side(row, row[name], shared)) for name in ("chosen", "rejected"))
        return first, second
    first = to_conversation({name: value for name, value in row.items() if name not in ANSWER_COLUMNS})
    if "rejected_messages" in row:
        return first, to_conversation(shared | {"messages": row["rejected_messages"]})
    answer = parse_messages(list_answers(row["rejected_response"]))
    if not any(message.content or message.role == "tool_call" for message in answer):
        raise BadRow("empty answer")
    return first, replace(first, messages=(*first.messages[: find_last_answer(first.messages)], *answer))


def find_last_answer(messages: tuple[Message, ...]) -> int:
    """Index of the first message after the last one that is no answer."""
    return max((index + 1 for index, message in enumerate(messages) if message.role not in ANSWER_ROLES), default=0)


def list_answers(value: Any) -> list[Any]:
    """The messages of an answer that is a text, a message or a list of messages."""
    value = parse_answer(value)
    if isinstance(value, Mapping):
        return [value]
    return list(value) if isinstance(value, list | tuple) else [{"role": "assistant", "content": value}]


def parse_answer(value: Any) -> Any:
    """An answer; a message or a list of messages in JSON text is parsed."""
    is_json = isinstance(value, str) and value.lstrip().startswith(('[{"', '{"role"', '{"from"'))
    return parse_value(value, "answer") if is_json else value


def build_side(row: RowMapping, answer: Any, shared: Mapping[str, Any]) -> dict[str, Any]:
    """Build the row of the conversation of one answer: alone, or after the prompt that it shares with the other."""
    answer = parse_answer(answer)
    if answer in (None, "", [], {}):
        raise BadRow("empty answer")
    if is_conversation(answer):
        return {**shared, "messages": answer}
    messages = get_column(row, "messages")
    query = {name: row[name] for name in QUERY if name in row}
    if messages is not None:
        query = {"prompt": parse_value(messages, "messages")}
    elif not query:
        if not isinstance(answer, str):
            raise BadRow("no question")
        return {**shared, "text": answer}
    has_messages = any(map(is_message_list, query.values())) or not isinstance(answer, str)
    return {**shared, **query, "output": list_answers(answer) if has_messages else answer}


def is_conversation(answer: Any) -> bool:
    """Whether an answer is a list of messages that begins with a question."""
    if not is_message_list(answer):
        return False
    roles = [str(item.get("role", item.get("from", ""))).lower() for item in answer]
    return next((role for role in roles if role not in ("system", "developer")), "") in ("user", "human")
