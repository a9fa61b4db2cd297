"""Both answers of a preference have the tokens of their conversations, with several turns, tools and any template."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from litgpt.data import Conversations, Preferences
from litgpt.data.read.conversation import to_conversation
from litgpt.data.read.preference import to_preferences
from litgpt.data.render.example import Example
from tests.data.templates import write_tokenizer

Row = dict[str, Any]


def say(role: str, content: str) -> Row:
    return {"role": role, "content": content}


def call(name: str) -> Row:
    return say("tool_call", json.dumps({"name": name, "arguments": {"size": 2}}))


TURNS = [say("user", "the quick fox"), say("assistant", "jumps"), say("user", "over"), say("assistant", "the dog")]
OTHER = [*TURNS[:-1], say("assistant", "two lazy dogs")]
CALLED = [say("user", "jump"), call("jump"), say("tool", "two"), say("assistant", "jumps over two")]
OTHER_CALLED = [say("user", "jump"), call("quick"), say("tool", "three"), say("assistant", "jumps over three")]
SHARE = {"user": "human", "assistant": "gpt", "tool_call": "function_call", "tool": "observation"}
TOOLS = [{"type": "function", "function": {"name": "jump", "parameters": {"type": "object", "properties": {}}}}]


def share(messages: list[Row]) -> list[Row]:
    return [{"from": SHARE[message["role"]], "value": message["content"]} for message in messages]


def list_forms(first: list[Row], second: list[Row], common: int) -> dict[str, Row]:
    """Rows of two conversations that have some messages in common at their start."""
    prompt, chosen, rejected = first[:common], first[common:], second[common:]
    forms: dict[str, Row] = {
        "implicit prompt": {"chosen": first, "rejected": second},
        "explicit prompt": {"prompt": prompt, "chosen": chosen, "rejected": rejected},
        "messages": {"messages": first, "rejected_messages": second},
        "messages as the prompt": {"messages": prompt, "chosen": chosen, "rejected": rejected},
        "ShareGPT": {"conversations": share(prompt), "chosen": share(chosen), "rejected": share(rejected)},
        "JSON": {name: json.dumps(side) for name, side in (("chosen", first), ("rejected", second))},
    }
    if len(chosen) == 1:
        text, other = chosen[0]["content"], rejected[0]["content"]
        forms |= {
            "rejected response": {"messages": first, "rejected_response": other},
            "texts after messages": {"prompt": prompt, "chosen": text, "rejected": other},
            "ShareGPT of LLaMA-Factory": {
                "conversations": share(prompt),
                "chosen": share(chosen)[0],
                "rejected": share(rejected)[0],
            },
        }
    return forms


def mask(messages: list[Row], common: int) -> list[Row]:
    """Do not train the answers among the first messages."""
    return [message | ({"loss": False} if index < common else {}) for index, message in enumerate(messages)]


CASES = [
    ("chatml", TURNS, OTHER, 3, {}),
    ("llama3", TURNS, OTHER, 3, {"system": "be quick"}),
    ("qwen3", CALLED, OTHER_CALLED, 1, {"tools": json.dumps(TOOLS)}),
    ("qwen3", CALLED, [*CALLED[:-1], say("assistant", "no")], 3, {"tools": json.dumps(TOOLS)}),
]


@pytest.mark.parametrize(("kind", "first", "second", "common", "shared"), CASES)
def test_forms_of_rows_have_the_tokens_of_their_conversations(
    tmp_path: Path, kind: str, first: list[Row], second: list[Row], common: int, shared: Row
) -> None:
    tokenizer = write_tokenizer(tmp_path, kind)
    data, plain = Preferences(sources=["rows.jsonl"]), Conversations(sources=["rows.jsonl"])
    for module in (data, plain):
        module.connect(tokenizer)
    conversations = [to_conversation({"messages": mask(messages, common)} | shared) for messages in (first, second)]
    expected = plain.build_renderer().build_examples(conversations)
    for name, row in list_forms(first, second, common).items():
        (built,) = data.build_renderer().build_examples(to_preferences(row | shared, None, "pairs"))
        assert isinstance(built, Example), name
        for document, side in zip(built.documents, expected, strict=True):
            assert isinstance(side, Example) and side.has_targets
            assert np.array_equal(document.ids, side.ids), name
            assert np.array_equal(document.weights, side.weights), name
