"""Messages keep their other fields; rows of images and of preferences are refused by the name of a column."""

from typing import Any

import pytest

from litgpt.data.read.conversation import Conversation, to_conversation
from litgpt.data.read.fields import BadRow
from litgpt.data.read.message import Message, list_fields

Q, A = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
F, CALL = {"name": "f", "arguments": "{}"}, '{"name": "f", "arguments": {}}'
NULL = {"content": None}


def call(**fields: Any) -> Message:
    return Message("tool_call", CALL, fields=fields)


# a row, and its messages
FORMS: list[tuple[dict[str, Any], list[Message]]] = [
    # TRL: a prompt and its completion, whose answers alone are trained
    ({"prompt": [Q], "completion": [A]}, [Message("user", "q"), Message("assistant", "a")]),
    ({"prompt": [Q], "completion": "a"}, [Message("user", "q"), Message("assistant", "a")]),
    ({"prompt": "q", "completion": [A]}, [Message("user", "q"), Message("assistant", "a")]),
    (
        {"prompt": [Q, A, Q], "completion": [A]},
        [Message("user", "q"), Message("assistant", "a", loss=False), Message("user", "q"), Message("assistant", "a")],
    ),
    # OpenAI: answers of calls only, ids and names, the older function_call, parts of the Responses API
    *(
        (
            {
                "messages": [
                    Q,
                    {"role": "assistant", **content, "tool_calls": [{"id": "1", "type": "function", "function": F}]},
                    {"role": "tool", "tool_call_id": "1", "name": "f", "content": "2"},
                    A,
                ]
            },
            [
                Message("user", "q"),
                Message("assistant", "", fields=NULL),
                call(id="1", type="function"),
                Message("tool", "2", fields={"tool_call_id": "1", "name": "f"}),
                Message("assistant", "a"),
            ],
        )
        for content in ({}, {"content": None}, {"content": []})
    ),
    (
        {"messages": [Q, {"role": "assistant", "content": None, "function_call": F}, {**A, "role": "function"}, A]},
        [
            Message("user", "q"),
            Message("assistant", "", fields=NULL),
            call(),
            Message("tool", "a"),
            Message("assistant", "a"),
        ],
    ),
    (
        {"messages": [Q, {**A, "content": "", "tool_calls": [{"function": {**F, "strict": True}, "index": 0}]}]},
        [Message("user", "q"), Message("assistant", ""), call(index=0, function={"strict": True})],
    ),
    (
        {
            "messages": [
                {"role": "user", "content": [{"type": "input_text", "text": "q"}]},
                {"role": "assistant", "content": [{"type": "output_text", "text": "a"}]},
            ]
        },
        [Message("user", "q"), Message("assistant", "a")],
    ),
    # Anthropic: reasoning and ids in blocks
    (
        {
            "messages": [
                Q,
                {
                    "role": "assistant",
                    "content": [
                        {"type": "thinking", "thinking": "hm"},
                        {"type": "text", "text": "a"},
                        {"type": "tool_use", "id": "1", "name": "f", "input": {}},
                    ],
                },
                {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "1", "content": "2"}]},
                A,
            ]
        },
        [
            Message("user", "q"),
            Message("assistant", "a", fields={"thinking": "hm"}),
            call(id="1"),
            Message("tool", "2", fields={"tool_call_id": "1"}),
            Message("assistant", "a"),
        ],
    ),
    (
        {"messages": [Q, {**A, "content": [{"type": "tool_use", "name": "f", "input": {}}], "thinking": "hm"}]},
        [Message("user", "q"), Message("assistant", "", fields=NULL | {"thinking": "hm"}), call()],
    ),
    # LLaMA-Factory: blocks with values, and loss_weight
    (
        {
            "messages": [
                {**Q, "content": [{"type": "text", "value": "q"}], "loss_weight": 0.0},
                {
                    "role": "assistant",
                    "content": [
                        {"type": "reasoning", "value": "hm"},
                        {"type": "text", "value": "a"},
                        {"type": "tool_call", "value": CALL},
                    ],
                    "loss_weight": 0.5,
                },
                {"role": "tool", "content": [{"type": "text", "value": "2"}], "loss_weight": 1},
                {**A, "loss_weight": 0.0},
            ]
        },
        [
            Message("user", "q"),
            Message("assistant", "a", weight=0.5, fields={"thinking": "hm"}),
            Message("tool_call", CALL, weight=0.5),
            Message("tool", "2", loss=True),
            Message("assistant", "a", loss=False),
        ],
    ),
    # fields under names that templates read; null is what Parquet writes for a field that other messages have
    (
        {"messages": [{**Q, "name": "Ada", "from": None}, {**A, "reasoning": "", "thinking": None, "at": 7}]},
        [Message("user", "q", fields={"name": "Ada"}), Message("assistant", "a", fields={"reasoning": "", "at": 7})],
    ),
    (
        {"messages": [Q, {"role": "tool_call", "content": {"id": "1", **F}, "name": "f"}]},
        [Message("user", "q"), call(id="1", name="f")],
    ),
    ({"conversation": [{"user": "q", "assistant": "a"}]}, [Message("user", "q"), Message("assistant", "a")]),
]


@pytest.mark.parametrize("number", range(len(FORMS)))
def test_forms(number: int) -> None:
    row, messages = FORMS[number]
    assert to_conversation(row) == Conversation(tuple(messages))


def test_fields_are_listed_as_paths() -> None:
    messages = [Message("user", "q", fields={"name": "Ada"}), call(id="1", type="function", function={"strict": True})]
    messages.append(Message("assistant", "", fields=NULL))
    assert list_fields(messages) == ["messages.name", "messages.tool_calls.id", "messages.tool_calls.function.strict"]


def test_fields_of_other_types_become_text_and_a_system_message_keeps_none() -> None:
    conversation = to_conversation(
        {"messages": [{"role": "system", "content": "s", "name": "n"}, {**Q, "at": b"x"}, A]}
    )
    assert conversation.messages[0].fields == {"at": "b'x'"}
    assert conversation.unread == ("messages.name",)


def test_functions_are_tools() -> None:
    assert to_conversation({"messages": [Q, A], "functions": [{"name": "f"}]}).tools == '[{"name": "f"}]'


MEDIA = [
    ({"messages": [{**Q, "images": ["cat.png"]}, A]}, "image data", "message.images"),
    ({"messages": [{**Q, "videos": ["cat.mp4"]}, A]}, "video data", "message.videos"),
    ({"messages": [{**Q, "content": [{"type": "file"}]}, A]}, "file data", "message.content"),
]


@pytest.mark.parametrize("number", range(len(MEDIA)))
def test_fields_of_messages_with_media_are_refused_by_their_names(number: int) -> None:
    row, kind, name = MEDIA[number]
    with pytest.raises(BadRow, match=rf"{kind} is not supported yet \({name}; remove it"):
        to_conversation(row)
    assert to_conversation({"messages": [Q, A], "images": [], "image": None}).unread == ()


# a row of preferences, and what its message says to set to train on the chosen answer
PREFERENCES: list[tuple[dict[str, Any], dict[str, str]]] = [
    ({"prompt": "q", "chosen": "a", "rejected": "b"}, {"chosen": "response", "rejected": "unused"}),
    ({"prompt": [Q], "chosen": [A], "rejected": [A]}, {"chosen": "response", "rejected": "unused"}),
    ({"chosen": [Q, A], "rejected": [Q, A]}, {"chosen": "messages", "rejected": "unused"}),
    ({"prompt": "q", "chosen": [Q, A], "rejected": [Q, A]}, {"chosen": "messages", "rejected": "unused"}),
    ({"chosen": "Human: q Assistant: a", "rejected": "b"}, {"chosen": "text", "rejected": "unused"}),
    ({"messages": [Q, A], "chosen": [Q, A], "rejected": [Q, A]}, {"rejected": "unused"}),
    ({"messages": [Q, A], "rejected_response": "b"}, {"rejected_response": "unused"}),
    ({"query": "q", "response": "a", "rejected_response": "b"}, {"rejected_response": "unused"}),
    ({"prompt": "q", "completion": "a", "label": False}, {"label": "unused"}),
    ({"messages": [Q, A], "label": True}, {"label": "unused"}),
    ({"instruction": "i", "input": "", "output": "a", "label": True}, {"label": "unused"}),
]


@pytest.mark.parametrize("number", range(len(PREFERENCES)))
def test_rows_of_preferences_are_refused_with_columns_that_work(number: int) -> None:
    row, columns = PREFERENCES[number]
    with pytest.raises(BadRow, match="preference row; use litgpt align with data: Preferences") as raised:
        to_conversation(row)
    assert "{" + ", ".join(f"{name}: {other}" for name, other in columns.items()) + "}" in raised.value.detail
    conversation = to_conversation(row, columns)
    assert conversation.messages[-1].role == "assistant" and "unused" not in conversation.unread


def test_instructions_of_litgpt_have_a_context_too() -> None:
    row = {"instruction": "i", "context": "x", "output": "a", "id": 1}
    conversation = to_conversation(row, format="instruction")
    assert conversation.messages[0] == Message("user", "i", context="x") and conversation.unread == ("id",)
