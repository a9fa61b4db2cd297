"""The messages of a conversation in the form that chat templates expect."""

import json
from collections.abc import Container
from dataclasses import dataclass, replace
from typing import Any

from litgpt.data.read.conversation import Conversation
from litgpt.data.read.message import Message

PLACEHOLDER = "\U000f8a33stand-in-{}\U000f8a34"
"""Replaces an answer to find where a template puts it."""
REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")
"""Names under which rows and templates have the reasoning before an answer."""


@dataclass
class Turn:
    """A message in the form that templates expect."""

    message: dict[str, Any]
    loss: bool | None
    weight: float
    text: str = ""

    @property
    def is_answer(self) -> bool:
        """Whether it is a message of the assistant."""
        return self.message["role"] == "assistant"


def build_turns(conversation: Conversation) -> list[Turn]:
    """Build turns; consecutive tool calls are merged into one turn of the assistant, with the text before them."""
    turns: list[Turn] = []
    if conversation.system is not None:
        turns.append(Turn({"role": "system", "content": conversation.system}, None, 1.0))
    previous: Message | None = None
    for message in conversation.messages:
        if message.role != "tool_call":
            turns.append(build_turn(message))
        else:
            if previous is None or previous.role not in ("assistant", "tool_call"):
                turns.append(Turn({"role": "assistant", "content": ""}, message.loss, message.weight))
            turns[-1].message.setdefault("tool_calls", []).append(build_call(message))
        previous = message
    return turns


def build_call(message: Message) -> dict[str, Any]:
    """Build a call in the form that templates expect, with the other fields that it has in the row."""
    parsed, rest = json.loads(message.content), dict(message.fields)
    inner = rest.pop("function", {})
    function = {"name": parsed["name"], "arguments": parsed.get("arguments") or {}, **inner}
    return {**({} if "type" in rest else {"type": "function"}), **rest, "function": function}


def build_turn(message: Message) -> Turn:
    """Build the turn of a message without tool calls."""
    text = f"{message.content}\n{message.context}" if message.context else message.content
    return Turn({"role": message.role, "content": text, **message.fields}, message.loss, message.weight, text)


def rename_reasoning(turn: Turn, names: Container[str]) -> Turn:
    """Rename the reasoning of an answer to the name that a template reads, unless it reads the name in the row."""
    name_in_row = next((name for name in REASONING_FIELDS if name in turn.message), None)
    other = next((name for name in REASONING_FIELDS if name in names), None)
    if name_in_row is None or name_in_row in names or other is None:
        return turn
    return replace(
        turn, message={(other if name == name_in_row else name): value for name, value in turn.message.items()}
    )


def fill_content(turn: Turn) -> Turn:
    """Replace the null content of an answer of calls only by an empty text."""
    return replace(turn, message=turn.message | {"content": ""}) if turn.message["content"] is None else turn


def make_placeholder(turn: Turn, number: int) -> Turn:
    """Build a turn of the same role and name with a placeholder as its text."""
    header = {name: turn.message[name] for name in ("role", "name") if name in turn.message}
    return replace(turn, message=header | {"content": PLACEHOLDER.format(number)})


def list_spellings(turn: Turn) -> list[str]:
    """List how templates may write the text of a turn: verbatim, or stripped of white space."""
    if any(name in turn.message for name in ("tool_calls", *REASONING_FIELDS)):
        return []
    return [turn.text, turn.text.strip(), turn.text.strip("\n"), turn.text.rstrip(), turn.text.lstrip()]
