"""Rows of every format become the conversations that a table says; bad rows have one reason each, and no traceback."""

import json
import random
from collections import Counter
from dataclasses import replace
from itertools import starmap
from typing import Any

import pytest

from litgpt.data.read.conversation import Conversation, to_conversation
from litgpt.data.read.fields import BadRow
from litgpt.data.read.message import Message
from tests.data.read.faults import check_fault

U, A, C, T, S = "user", "assistant", "tool_call", "tool", "system"
CALL = '{"name": "add", "arguments": {"a": 1}}'
TOOLS = '[{"type": "function", "function": {"name": "add", "parameters": {}}}]'

# a row, what is said in it, and what else of the conversation is not the default
GOLDEN: list[tuple[dict[str, Any], list[tuple[str, str]], dict[str, Any]]] = [
    # messages, ShareGPT, OpenAI, Anthropic
    ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}, [(U, "q"), (A, "a")], {}),
    ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, [(U, "q"), (A, "a")], {}),
    ({"conversation": [{"from": "user", "value": "q"}, {"from": "bot", "value": "a"}]}, [(U, "q"), (A, "a")], {}),
    ({"messages": [{"human": "q", "assistant": "a"}], "system": "s"}, [(U, "q"), (A, "a")], {"system": "s"}),
    (
        {"conversation": [{"human": "q", "assistant": "a"}, {"human": "r", "assistant": "b"}]},
        [(U, "q"), (A, "a"), (U, "r"), (A, "b")],
        {},
    ),
    (
        {
            "messages": [
                {"role": "system", "content": "s"},
                {"role": "user", "content": "q"},
                {"role": "assistant", "content": "a"},
            ]
        },
        [(U, "q"), (A, "a")],
        {"system": "s"},
    ),
    (
        {
            "system": "row",
            "messages": [
                {"role": "system", "content": ""},
                {"role": "user", "content": "q"},
                {"role": "assistant", "content": "a"},
            ],
        },
        [(U, "q"), (A, "a")],
        {"system": "", "unread": ("system",)},
    ),
    (
        {
            "messages": [
                {"role": "user", "content": "q"},
                {"role": "system", "content": "later"},
                {"role": "assistant", "content": "a"},
            ]
        },
        [(U, "q"), (S, "later"), (A, "a")],
        {},
    ),
    (
        {
            "conversations": [
                {"from": "human", "value": "q"},
                {"from": "function_call", "value": CALL},
                {"from": "observation", "value": "2"},
                {"from": "gpt", "value": "two"},
            ],
            "tools": TOOLS,
        },
        [(U, "q"), (C, CALL), (T, "2"), (A, "two")],
        {"tools": TOOLS},
    ),
    (
        {
            "messages": [
                {"role": "user", "content": "q"},
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}],
                },
                {"role": "tool", "content": "2"},
                {"role": "assistant", "content": "two"},
            ]
        },
        [(U, "q"), (A, ""), (C, CALL), (T, "2"), (A, "two")],
        {},
    ),
    (
        {
            "messages": [
                {"role": "user", "content": "q"},
                {
                    "role": "assistant",
                    "content": "I add",
                    "tool_calls": [
                        {"function": {"name": "add", "arguments": {"a": 1}}},
                        {"function": {"name": "add", "arguments": {"b": 2}}},
                    ],
                },
            ]
        },
        [(U, "q"), (A, "I add"), (C, CALL), (C, '{"name": "add", "arguments": {"b": 2}}')],
        {},
    ),
    (
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "q"}, {"type": "text", "text": "r"}]},
                {
                    "role": "assistant",
                    "content": [
                        {"type": "text", "text": "a"},
                        {"type": "tool_use", "name": "add", "input": {"a": 1}},
                    ],
                },
                {"role": "user", "content": [{"type": "tool_result", "content": [{"type": "text", "text": "2"}]}]},
                {"role": "assistant", "content": "b"},
            ]
        },
        [(U, "qr"), (A, "a"), (C, CALL), (T, "2"), (A, "b")],
        {},
    ),
    (
        {"messages": '[{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]'},
        [(U, "q"), (A, "a")],
        {},
    ),
    (
        {"messages": "[{'role': 'user', 'content': 'q'}, {'role': 'assistant', 'content': 'a'}]"},
        [(U, "q"), (A, "a")],
        {},
    ),
    (
        {"MESSAGES": [{"role": "USER", "content": "q"}, {"role": "Assistant", "content": "a"}]},
        [(U, "q"), (A, "a")],
        {},
    ),
    (
        {"messages": [{"role": "assistant", "content": "hello"}, {"role": "assistant", "content": "again"}]},
        [(A, "hello"), (A, "again")],
        {},
    ),
    # Alpaca
    ({"instruction": "i", "input": "x", "output": "a"}, [(U, "i\nx"), (A, "a")], {}),
    ({"instruction": "i", "input": "", "output": "a"}, [(U, "i"), (A, "a")], {}),
    ({"instruction": "", "input": "x", "output": "a"}, [(U, "x"), (A, "a")], {}),
    ({"instruction": "i", "output": "a"}, [(U, "i"), (A, "a")], {}),
    (
        {"instruction": "i", "input": "x", "output": "a", "text": "all of it"},
        [(U, "i\nx"), (A, "a")],
        {"unread": ("text",)},
    ),
    ({"instruction": "i", "input": None, "output": "a"}, [(U, "i"), (A, "a")], {}),
    (
        {"instruction": "i", "input": "x", "output": "a", "system": "s", "history": [["q", "r"]]},
        [(U, "q"), (A, "r"), (U, "i\nx"), (A, "a")],
        {"system": "s"},
    ),
    ({"instruction": "i", "context": "x", "response": "a"}, [(U, "i\nx"), (A, "a")], {}),
    (
        {"instruction": "i", "context": "x", "input": "y", "output": "a"},
        [(U, "i\ny"), (A, "a")],
        {"unread": ("context",)},
    ),
    ({"question": "q", "context": "x", "answer": "a"}, [(U, "q"), (A, "a")], {"unread": ("context",)}),
    # question and answer
    ({"query": "q", "response": "a"}, [(U, "q"), (A, "a")], {}),
    ({"prompt": "q", "completion": "a"}, [(U, "q"), (A, "a")], {}),
    ({"question": "q", "answer": "a"}, [(U, "q"), (A, "a")], {}),
    ({"problem": "q", "solution": "a"}, [(U, "q"), (A, "a")], {}),
    ({"Question": "q", "Answer": "a"}, [(U, "q"), (A, "a")], {}),
    ({"input": "q", "targets": "a"}, [(U, "q"), (A, "a")], {}),
    ({"question": "q", "answers": ["a", "b"]}, [(U, "q"), (A, "a")], {"unread": ("answers after the first",)}),
    ({"query": "q", "response": "a", "text": "q a"}, [(U, "q"), (A, "a")], {"unread": ("text",)}),
    ({"query": "q", "response": "a", "system_prompt": "s"}, [(U, "q"), (A, "a")], {"system": "s"}),
    (
        {"query": "q", "response": "a", "history": [["h", "i"]]},
        [(U, "h"), (A, "i"), (U, "q"), (A, "a")],
        {},
    ),
    (
        {"query": "q", "response": "a", "history": "[['h', 'i']]"},
        [(U, "h"), (A, "i"), (U, "q"), (A, "a")],
        {},
    ),
    (
        {"query": "q", "response": "a", "source": "s", "id": 7, "score": None},
        [(U, "q"), (A, "a")],
        {"unread": ("source", "id")},
    ),
    ({"query": "q", "response": "a", "tags": [], "label": 1}, [(U, "q"), (A, "a")], {"unread": ("label",)}),
    ({"text": "once", "label": True}, [(A, "once")], {"unread": ("label",)}),
    ({"query": "q", "response": "a", "channel": "math"}, [(U, "q"), (A, "a")], {"channel": "math"}),
    ({"query": "q", "response": "a", "weight": 0.5}, [(U, "q"), (A, "a")], {"weight": 0.5}),
    ({"query": "q", "response": "a", "tools": json.loads(TOOLS)}, [(U, "q"), (A, "a")], {"tools": TOOLS}),
    ({"query": "日本", "response": "é 😀"}, [(U, "日本"), (A, "é 😀")], {}),
    # plain text
    ({"text": "once"}, [(A, "once")], {}),
    ({"content": "once"}, [(A, "once")], {}),
    ({"messages": [{"role": "assistant", "content": "once"}]}, [(A, "once")], {}),
]


@pytest.mark.parametrize("number", range(len(GOLDEN)))
def test_rows(number: int) -> None:
    row, said, rest = GOLDEN[number]
    before = json.dumps(row)
    conversation = to_conversation(row)
    spoken = tuple(replace(message, fields={}) for message in conversation.messages)
    assert replace(conversation, messages=spoken) == Conversation(tuple(starmap(Message, said)), **rest)
    assert json.dumps(row) == before  # nothing of the caller's is changed


def test_columns_are_renamed() -> None:
    row = {"my_q": "q", "reply": "a", "prompt": "no"}
    said = to_conversation(row, {"My_Q": "query", "reply": "response", "prompt": "unused"})
    assert said.messages == (Message(U, "q"), Message(A, "a"))


def test_format_that_is_asked_for() -> None:
    row = {"text": "once", "query": "q", "response": "a"}
    assert to_conversation({"text": "once", "title": "t"}, format="text").is_text
    assert to_conversation(row, format="query-response").messages[1].content == "a"


def test_messages_say_whether_they_are_trained() -> None:
    row = {
        "messages": [
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": "a", "loss": False},
            {"role": "user", "content": "r"},
            {"role": "assistant", "content": "b", "loss": 1, "loss_scale": 2, "reasoning_content": "hm"},
        ]
    }
    _, first, _, last = to_conversation(row).messages
    assert (first.loss, first.weight) == (False, 1.0)
    assert (last.loss, last.weight, last.fields) == (True, 2.0, {"reasoning_content": "hm"})


def test_tool_json_is_kept_as_it_is_spelled() -> None:
    call = '{"arguments":{"b":1,  "a": "é"},"name":"f"}'
    tools = '[ {"name":"f"} ]'
    row = {"messages": [{"role": "user", "content": "q"}, {"role": "tool_call", "content": call}], "tools": tools}
    said = to_conversation(row)
    assert (said.messages[-1].content, said.tools) == (call, tools)


QA = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
DEEP = "[" * 100_000
FAULTS: list[tuple[Any, str]] = [
    ("text", "not an object"),
    (None, "not an object"),
    ([1], "not an object"),
    ({}, "empty row"),
    ({"text": None}, "empty row"),
    ({"id": 3}, "no messages"),
    ({"messages": []}, "no messages"),
    ({"messages": 7}, "messages is not a list"),
    ({"messages": {"role": "user"}}, "messages is not a list"),
    ({"messages": "hello"}, "messages: not JSON"),
    ({"messages": DEEP}, "messages: not JSON"),
    ({"messages": "9" * 10_000}, "messages: not JSON"),
    ({"messages": "(" * 2_000_000}, "messages: not JSON"),
    ({"messages": QA, "conversations": QA}, "duplicate column"),
    ({"messages": QA, "Messages": QA}, "duplicate column"),
    ({"question": "q", "answer": "a", "solution": "b"}, "duplicate column"),
    ({"prompt": "q", "question": "q", "answer": "a"}, "duplicate column"),
    ({7: "q", "answer": "a"}, "column name is not text"),
    ({"messages": ["hello"]}, "message is not an object"),
    ({"messages": [{"content": "q"}]}, "message without a role"),
    ({"messages": [{"role": "narrator", "content": "q"}]}, "unknown role"),
    ({"messages": [{"role": ["user"], "content": "q"}]}, "unknown role"),
    ({"messages": [{"role": "user"}]}, "message without content"),
    ({"messages": [{"role": "user", "content": []}]}, "message without content"),
    ({"messages": [{"role": "user", "content": 5}]}, "content is not text"),
    ({"messages": [{"role": "user", "content": [{"type": "video_url"}]}]}, "more places for videos than videos"),
    ({"messages": [{"role": "user", "content": [{"type": "table"}]}]}, "content is not text"),
    ({"messages": QA[:1]}, "does not end with an answer"),
    ({"messages": [{"role": "system", "content": "s"}]}, "no messages"),
    ({"messages": [*QA, {"role": "tool_call", "content": "add(1)"}]}, "tool call: not JSON"),
    ({"messages": [*QA, {"role": "tool_call", "content": "[1]"}]}, "tool call is not an object"),
    ({"messages": [*QA, {"role": "tool_call", "content": "{}"}]}, "tool call without a name"),
    (
        {"messages": [*QA, {"role": "tool_call", "content": '{"name": "f", "arguments": [1]}'}]},
        "tool call arguments are not an object",
    ),
    ({"messages": [*QA, {"role": "assistant", "tool_calls": {"a": 1}}]}, "tool_calls is not a list"),
    ({"messages": [{"role": "user", "content": "q", "loss": "no"}, QA[1]]}, "loss is not true or false"),
    (
        {"messages": [QA[0], {"role": "assistant", "content": "a", "loss_scale": "2"}]},
        "loss_scale is not a number from 0 to 1000000",
    ),
    ({"query": "q", "response": "a", "weight": float("nan")}, "weight is not a number from 0 to 1000000"),
    ({"query": "q", "response": "a", "weight": -1}, "weight is not a number from 0 to 1000000"),
    ({"messages": QA, "tools": "add"}, "tools: not JSON"),
    ({"messages": QA, "tools": '{"name": "f"}'}, "tools is not a list"),
    ({"messages": QA, "tools": [{"type": "function"}]}, "tool without a name"),
    ({"messages": QA, "channel": 1.5}, "channel is not text"),
    ({"query": "", "response": "a"}, "empty question"),
    ({"query": None, "response": "a"}, "no question"),
    ({"Instruction": None, "output": "a"}, "no question"),
    ({"query": "q", "response": ""}, "empty answer"),
    ({"query": "q", "response": []}, "empty answer"),
    ({"query": "q"}, "no answer"),
    ({"query": b"q", "response": "a"}, "query is not text"),
    ({"query": "q", "response": "\ud800"}, "unpaired surrogate"),
    ({"query": "q", "response": "a", "history": "q"}, "history: not JSON"),
    ({"query": "q", "response": "a", "history": [["q"]]}, "history is not a list of pairs"),
    ({"text": ""}, "empty text"),
    ({"instruction": 1, "input": "", "output": "a"}, "instruction is not text"),
]


@pytest.mark.parametrize("number", range(len(FAULTS)))
def test_faults(number: int) -> None:
    check_fault(*FAULTS[number])


def test_two_thousand_faults_are_counted_exactly() -> None:
    order = random.Random(7)
    rows = [order.choice(FAULTS) for _ in range(2000)]
    reasons: Counter[str] = Counter()
    for row, _ in rows:
        try:
            to_conversation(row)
        except BadRow as fault:
            reasons[fault.reason] += 1
    assert reasons == Counter(reason for _, reason in rows)


def scrambled(value: Any, order: random.Random) -> Any:
    """A value of which some part is another kind of thing."""
    if order.random() < 0.15:
        odd = [None, 0, -1, 1.5, float("inf"), True, "", "x", "\ud800", "\0", b"x", [], {}, [[]], {"a": []}, 2**70]
        return order.choice(odd)
    if isinstance(value, dict):
        items = [(key if order.random() > 0.1 else order.choice(["", "role", 3]), item) for key, item in value.items()]
        return {key: scrambled(item, order) for key, item in items}
    if isinstance(value, list):
        return [scrambled(item, order) for item in value]
    return value


def test_whatever_a_row_holds_it_is_read_or_has_a_reason() -> None:
    order = random.Random(3)
    outcomes: Counter[bool] = Counter()
    for _ in range(4000):
        row, _, _ = order.choice(GOLDEN)
        try:
            said = to_conversation(scrambled(row, order))
        except BadRow as fault:
            assert fault.reason and "\n" not in fault.reason
            outcomes[False] += 1
        else:
            assert all(isinstance(message.content, str) for message in said.messages)
            "".join(message.content for message in said.messages).encode("utf-8")
            outcomes[True] += 1
    assert min(outcomes[True], outcomes[False]) > 500
