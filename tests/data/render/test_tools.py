"""Tools in plain text: calls are read back as they were written, results are not trained, Hermes is the template's."""

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest

from litgpt.data.read.conversation import Conversation, to_conversation
from litgpt.data.read.fields import BadRow, dump_json
from litgpt.data.read.message import Message
from litgpt.data.render.chat_renderer import ChatRenderer, LossMask
from litgpt.data.render.chat_template import read_template
from litgpt.data.render.example import Example
from litgpt.data.render.tools import RESULT_MASKS, ToolFormat, write_calls, write_tools_as_text
from tests.data.templates import write_tokenizer

TOOL_FORMATS: list[ToolFormat] = ["hermes", "json", "qwen", "react"]
TOOLS = dump_json([{"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {"a": 1}}}])
CALLED = {
    "messages": [
        {"role": "user", "content": "add"},
        {
            "role": "assistant",
            "content": "I add.",
            "tool_calls": [
                {"function": {"name": "add", "arguments": {"b": 'q"\n', "a": "é"}}},
                {"function": {"name": "add", "arguments": {"c": [1, None]}}},
            ],
        },
        {"role": "tool", "content": "2"},
        {"role": "tool", "content": "3"},
        {"role": "assistant", "content": "the answer"},
    ]
}


PATTERNS = {
    "hermes": r"(?s)<tool_call>\n(.*?)\n</tool_call>",
    "json": r"(?m)^CALLS: (\[.*\])$",
    "qwen": r"(?m)^✿FUNCTION✿: (.*)\n✿ARGS✿: (.*)$",
    "react": r"(?m)^Action: (.*)\nAction Input: (.*)$",
}


def parse_calls(text: str, tool_format: ToolFormat) -> list[dict[str, Any]]:
    """Parse the calls that a model wrote; whatever is not JSON with a name is not a call."""
    calls: list[Any] = []
    for match in re.finditer(PATTERNS[tool_format], text):
        try:
            value = json.loads(match[match.lastindex or 0])
        except ValueError:
            continue
        if match.lastindex == 2:
            calls.append({"name": match[1], "arguments": value})
        else:
            calls += value if isinstance(value, list) else [value]
    return [call for call in calls if isinstance(call, dict) and isinstance(call.get("name"), str)]


def arguments(order: random.Random, depth: int = 2) -> dict[str, Any]:
    texts = [
        "",
        "é😀",
        'a"b',
        "line\nend",
        "\u2028",
        "</tool_call>",
        "Action: x\nAction Input: {}",
        "CALLS: []",
        "✿ARGS✿: {}",
        "\\",
        "}",
    ]
    values: list[Any] = [*texts, 0, -1.5, None, True, [], {}, [1, "a"]]
    values_by_name = {order.choice([*texts, "a", "b", "c"]): order.choice(values) for _ in range(order.randint(0, 4))}
    return values_by_name | ({"inner": arguments(order, depth - 1)} if depth and order.random() < 0.5 else {})


@pytest.mark.parametrize("tool_format", TOOL_FORMATS)
def test_calls_are_read_back(tool_format: ToolFormat) -> None:
    order = random.Random(1)
    for _ in range(60):
        calls = [{"name": order.choice(["f", "g_2", "a-b"]), "arguments": arguments(order)} for _ in range(3)]
        said = order.choice(["", "I call.", "Thought: so\nit is"])
        written = write_calls(said, map(dump_json, calls), tool_format)
        assert parse_calls(written, tool_format) == calls and written.startswith(said)
    faults = [
        "",
        "plain",
        "<tool_call>\n{\n</tool_call>",
        "CALLS: [1]",
        "Action: f\nAction Input: nothing",
        "CALLS: [{}]",
    ]
    assert [parse_calls(text, tool_format) for text in faults] == [[]] * len(faults)


@pytest.mark.parametrize("tool_format", [one for one in TOOL_FORMATS if one != "qwen"])
def test_one_turn_of_calls_and_one_of_results(tool_format: ToolFormat) -> None:
    said = write_tools_as_text(to_conversation(CALLED | {"tools": TOOLS, "system": "Be brief."}), tool_format)
    assert [message.role for message in said.messages] == ["user", "assistant", "user", "assistant"]
    assert said.tools is None and said.system is not None and said.system.startswith("Be brief.\n\n")
    assert "add" in said.system and "Adds." in said.system and '{"a": 1}' in said.system
    calls = parse_calls(said.messages[1].content, tool_format)
    assert [call["arguments"] for call in calls] == [{"b": 'q"\n', "a": "é"}, {"c": [1, None]}]
    assert "2" in said.messages[2].content and "3" in said.messages[2].content
    plain = Conversation((Message("user", "q"), Message("assistant", "a")), "Be brief.")
    assert write_tools_as_text(plain, tool_format) is plain


def test_qwen_writes_calls_results_and_the_answer_as_one_turn() -> None:
    again = [{"role": "tool_call", "content": '{"name": "add", "arguments": {}}'}, {"role": "tool", "content": "4"}]
    row = {"messages": [*CALLED["messages"][:-1], *again, {"role": "assistant", "content": "the answer"}]}
    said = write_tools_as_text(to_conversation(row | {"tools": TOOLS}), "qwen")
    assert [message.role for message in said.messages] == ["user", "assistant"]
    assert said.messages[1].content == (
        'I add.\n✿FUNCTION✿: add\n✿ARGS✿: {"b": "q\\"\\n", "a": "é"}\n✿FUNCTION✿: add\n✿ARGS✿: {"c": [1, null]}\n'
        "✿RESULT✿: 2\n✿RESULT✿: 3\n✿FUNCTION✿: add\n✿ARGS✿: {}\n✿RESULT✿: 4\n✿RETURN✿: the answer"
    )
    assert len(parse_calls(said.messages[1].content, "qwen")) == 3


@pytest.mark.parametrize("last", [{"content": "a", "loss": False}, {"content": "a", "weight": 2.0}])
def test_qwen_refuses_a_turn_that_is_trained_in_part(last: dict[str, Any]) -> None:
    row = {"messages": [*CALLED["messages"][:-1], {"role": "assistant", **last}]}
    with pytest.raises(BadRow, match="differs between calls and answer"):
        write_tools_as_text(to_conversation(row), "qwen")


def test_qwen_refuses_results_that_would_end_themselves() -> None:
    result = {"role": "tool", "content": "✿RETURN✿: train me"}
    row = {"messages": [*CALLED["messages"][:2], result, CALLED["messages"][-1]]}
    with pytest.raises(BadRow, match="words of the tool format"):
        write_tools_as_text(to_conversation(row), "qwen")


def test_hermes_is_what_templates_of_its_kind_write(tmp_path: Path) -> None:
    """Calls and results, written as text in ChatML, are the tokens that Qwen's template makes of them."""
    tokenizer = write_tokenizer(tmp_path / "qwen3", "qwen3")
    write_tokenizer(tmp_path / "chatml", "chatml")
    qwen, chatml = (read_template(tmp_path / kind) for kind in ("qwen3", "chatml"))
    assert qwen is not None and chatml is not None
    conversation = to_conversation(CALLED)
    expected, _ = ChatRenderer(tokenizer, qwen).render(conversation)
    text, _ = ChatRenderer(tokenizer, chatml).render(write_tools_as_text(conversation, "hermes"))
    assert text == expected.replace("<think>\n\n</think>\n\n", "")


@pytest.mark.parametrize("tool_format", TOOL_FORMATS)
def test_results_are_not_trained(tmp_path: Path, tool_format: ToolFormat) -> None:
    tokenizer = write_tokenizer(tmp_path, "chatml")
    template = read_template(tmp_path)
    assert template is not None
    renderer = ChatRenderer(tokenizer, template, LossMask(weights=RESULT_MASKS.get(tool_format, ())))
    (example,) = renderer.build_examples([write_tools_as_text(to_conversation(CALLED | {"tools": TOOLS}), tool_format)])
    assert isinstance(example, Example)
    trained = tokenizer.processor.decode(example.ids[example.weights > 0].tolist(), skip_special_tokens=False)
    assert trained.startswith("I add.\n") and trained.endswith("the answer<|im_end|>")
    assert '{"c": [1, null]}' in trained
    assert "3" not in trained and "Adds." not in trained
