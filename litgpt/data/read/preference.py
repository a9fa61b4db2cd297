"""Convert rows of the usual formats to preferences: two answers that are compared, or one that is rated."""

import math
from collections.abc import Iterable, Iterator, Mapping
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
from litgpt.data.read.media import MEDIA_KINDS
from litgpt.data.read.message import MEDIA_FIELDS, Message, RowMapping, parse_message

PreferenceKind = Literal["pairs", "rated"]
SHARED_COLUMNS = ("history", *COLUMN_NAMES["system"], *COLUMN_NAMES["tools"], "channel", "weight", *MEDIA_FIELDS)
"""Columns that belong to both answers."""
REJECTED_COLUMNS = ("rejected", "rejected_response", "rejected_messages")
REJECTED_MEDIA = tuple(f"rejected_{kind}s" for kind in MEDIA_KINDS)
"""The columns of ms-swift with other media for the rejected answer, which are not supported."""
ANSWER_COLUMNS = {"chosen", *REJECTED_COLUMNS, "margin", "label"}
ANSWER_ROLES = ("assistant", "tool_call")
COLUMNS_READ = {
    "reward": {"margin"},
    "pairs": {"weight", "messages.loss_scale"},
    "kto": {"weight", "messages.loss_scale"},
}
"""The columns and fields that not all objectives of preferences read, by objective; none reads `channel`."""


@dataclass(frozen=True)
class Preference(Conversation):
    """A conversation whose last answers are preferred to those of another, or are rated.

    Attributes:
        other: the conversation that is not preferred; for one that is rated, its prompt with the answers of another
            one, and None until `mismatch_answers` has set it.
        value: the margin of the preference; of one that is rated, 1 if it is desirable, and 0 if not.
    """

    other: Conversation | None = None
    value: float = 0.0


def list_sides(conversation: Conversation) -> list[Conversation]:
    """List the conversations of both answers of a preference; of others, the conversation itself."""
    other = conversation.other if isinstance(conversation, Preference) else None
    return [conversation] if other is None else [conversation, other]


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
    for name in REJECTED_MEDIA:
        if row.get(name):
            raise BadRow("answers with different media", f"{name}; remove it to compare answers to the same ones")
    if not has_pair(row):
        if kind == "pairs":
            detail = "rows with a label are for litgpt kto" if "label" in row else f"columns {', '.join(row)}"[:120]
            raise BadRow("not two answers: no chosen and rejected", detail)
        return [list_conditional(check_shared_media(rate_conversation(row)), row)]
    pair = list_conditional(check_shared_media(build_preference(row)), row)
    if kind == "pairs":
        return [pair]
    assert pair.other is not None
    if not find_last_round(pair.messages):
        raise BadRow("no question")
    chosen, rejected = vars(pair) | {"other": None, "value": 1.0}, vars(pair.other)
    return [Preference(**chosen), Preference(**rejected, value=0.0)]


def check_shared_media(preference: Preference) -> Preference:
    """Check that the media of a preference are those of its prompt.

    Raises:
        BadRow: if an answer has some, or the prompts have different ones; or if there are boxes in the images.
    """
    sides = list_sides(preference)
    for side in sides:
        for message in side.messages[find_last_answer(side.messages) :]:
            for medium in message.media:
                raise BadRow(f"{medium.kind} in an answer is not supported by preferences", "move it to the prompt")
        if side.objects is not None:
            raise BadRow("boxes are not supported by preferences", "write them into the texts")
    if any(side.media != preference.media for side in sides):
        raise BadRow("answers with different media", "use the same in both prompts")
    return preference


def list_conditional(preference: Preference, row: RowMapping) -> Preference:
    """Add to the unread columns those that some objectives read, or none; a report leaves out what its run reads."""
    names = [name for name in ("margin", "channel", "weight") if name in row]
    messages = (message for side in list_sides(preference) for message in side.messages)
    scaled = ["messages.loss_scale"] if any(message.weight != 1 for message in messages) else []
    return replace(preference, unread=tuple(dict.fromkeys([*preference.unread, *names, *scaled])))


def rate_conversation(row: RowMapping) -> Preference:
    """Build a rated conversation of a row with a `label`."""
    label = row.get("label")
    if label not in (True, False, 0, 1):
        raise BadRow("no label of true or false", repr(label)[:80])
    conversation = to_conversation({name: value for name, value in row.items() if name != "label"})
    start = find_last_round(conversation.messages)
    if not start:
        raise BadRow("no question")
    return Preference(**vars(mask_answers(conversation, start)), value=float(label))


def build_preference(row: RowMapping) -> Preference:
    """Build the preference of a row with two answers."""
    names = [name for name in REJECTED_COLUMNS if name in row]
    if len(names) > 1:
        raise BadRow("duplicate column", f"{names[0]} and {names[1]} are both the rejected answer; set columns")
    first, second = build_conversations(row)
    if first.is_text != second.is_text:
        raise BadRow("no question", "one of the answers is a text without it")
    if not (has_answer(first.messages) and has_answer(second.messages)):
        raise BadRow("empty answer")
    if first.messages == second.messages:
        raise BadRow("identical answers")
    common = count_common(first.messages, second.messages)
    chosen, rejected = mask_answers(first, common), mask_answers(second, common)
    read = {*ANSWER_COLUMNS, *SHARED_COLUMNS, *COLUMN_NAMES["messages"], *QUERY} - {"label"}
    if "chosen" not in row:
        read |= {*COLUMN_NAMES["response"]}
    unread = [name for name, value in row.items() if name not in read and value not in ("", [], {})]
    chosen = replace(chosen, unread=tuple(dict.fromkeys([*unread, *chosen.unread, *rejected.unread])))
    return Preference(**vars(chosen), other=rejected, value=parse_margin(row.get("margin")))


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
    return first, replace(first, messages=(*first.messages[: find_last_answer(first.messages)], *answer))


def has_answer(messages: tuple[Message, ...]) -> bool:
    """Whether the messages after the last one that is no answer have a text or a call."""
    answers = messages[find_last_answer(messages) :]
    return any(message.content or message.role == "tool_call" for message in answers)


def find_last_round(messages: tuple[Message, ...]) -> int:
    """Index of the first message after the last question; 0 without one."""
    return max((index + 1 for index, message in enumerate(messages) if message.role == "user"), default=0)


def mismatch_answers(located: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """Give each rated conversation the answers of the next one with another prompt, the last ones those of the first.

    KTO estimates by them how far the policy is from the reference (Ethayarajh et al. 2024, section 4.2). If all have
    the same prompt, the answers stay.
    """
    first: Preference | None = None
    waiting: list[tuple[str, Preference]] = []  # all with the same prompt
    for location, preference in located:
        first = preference if first is None else first
        if waiting and get_prompt(waiting[0][1]) != get_prompt(preference):
            yield from ((place, borrow_answers(item, preference)) for place, item in waiting)
            waiting = []
        waiting.append((location, preference))
    yield from ((place, borrow_answers(item, item if first is None else first)) for place, item in waiting)


def get_prompt(conversation: Conversation) -> tuple[Message, ...]:
    """The messages before the last answers."""
    return conversation.messages[: find_last_round(conversation.messages)]


def borrow_answers(preference: Preference, other: Preference) -> Preference:
    """Set the conversation of a rated one that has the last answers of another."""
    answers = other.messages[find_last_round(other.messages) :]
    fields = {name: value for name, value in vars(preference).items() if name not in ("other", "value")}
    return replace(preference, other=Conversation(**fields | {"messages": (*get_prompt(preference), *answers)}))


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
    prompts = [value for value in query.values() if is_message_list(value)]
    if not prompts and isinstance(answer, str):
        return {**shared, **query, "output": answer}
    answers = list_answers(answer)
    if prompts and answers and ends_with_answer(prompts[0], answers[0]):
        raise BadRow("an answer before chosen and rejected", "end the prompt with a question or a result")
    return {**shared, **query, "output": answers}


def ends_with_answer(prompt: Any, answer: Any) -> bool:
    """Whether the last message of a prompt is a text of the assistant, as is the answer's first."""
    return all(parse_message(item)[side].role == "assistant" for item, side in ((prompt[-1], -1), (answer, 0)))


def is_conversation(answer: Any) -> bool:
    """Whether an answer is a list of messages that begins with a question."""
    if not is_message_list(answer):
        return False
    roles = [str(item.get("role", item.get("from", ""))).lower() for item in answer]
    return next((role for role in roles if role not in ("system", "developer")), "") in ("user", "human")
