"""Rows of pairs and rated rows of all usual forms give the conversations that the same messages give."""

import json
from typing import Any

import pytest

from litgpt.data.read.conversation import to_conversation
from litgpt.data.read.fields import BadRow
from litgpt.data.read.preference import Preference, mismatch_answers, to_preferences

Q, A, B = ({"role": role, "content": text} for role, text in (("user", "q"), ("assistant", "a"), ("assistant", "b")))
CHAT = {
    name: [{"from": "human" if m["role"] == "user" else "gpt", "value": m["content"]} for m in messages]
    for name, messages in {"q": [Q], "a": [A], "b": [B]}.items()
}
FORMS: dict[str, dict[str, Any]] = {
    "texts after a prompt": {"prompt": "q", "chosen": "a", "rejected": "b"},
    "texts after a question": {"question": "q", "chosen": "a", "rejected": "b"},
    "answers after a prompt of messages": {"prompt": [Q], "chosen": [A], "rejected": [B]},
    "texts after a prompt of messages": {"prompt": [Q], "chosen": "a", "rejected": "b"},
    "a message each": {"prompt": "q", "chosen": A, "rejected": B},
    "whole conversations": {"chosen": [Q, A], "rejected": [Q, B]},
    "whole conversations and their prompt": {"prompt": "q", "chosen": [Q, A], "rejected": [Q, B]},
    "whole conversations as JSON": {"chosen": json.dumps([Q, A]), "rejected": json.dumps([Q, B])},
    "ShareGPT": {"conversations": CHAT["q"], "chosen": CHAT["a"][0], "rejected": CHAT["b"][0]},
    "messages and a prompt's answers": {"messages": [Q], "chosen": [A], "rejected": [B]},
    "messages and the other answer": {"messages": [Q, A], "rejected_response": "b"},
    "messages and the other answer's message": {"messages": [Q, A], "rejected_response": [B]},
    "messages and other messages": {"messages": [Q, A], "rejected_messages": [Q, B]},
    "messages of LLaMA-Factory": {
        f"{side}_messages": [
            {"role": role, "content": [{"type": "text", "value": text}], "loss_weight": weight}
            for role, text, weight in (("user", "q", 0.0), ("assistant", answer, 1.0))
        ]
        for side, answer in (("chosen", "a"), ("rejected", "b"))
    },
    "question, answer and the other": {"query": "q", "response": "a", "rejected_response": "b"},
    "alpaca": {"instruction": "q", "input": "", "chosen": "a", "rejected": "b"},
}


def pair_of(row: dict[str, Any], columns: dict[str, str] | None = None) -> Preference:
    (preference,) = to_preferences(row, columns, "pairs")
    assert preference.other is not None
    return preference


@pytest.mark.parametrize("form", FORMS)
def test_pairs_of_all_forms_are_two_conversations(form: str) -> None:
    preference = pair_of(FORMS[form])
    assert preference.messages == to_conversation({"messages": [Q, A]}).messages
    assert preference.other.messages == to_conversation({"messages": [Q, B]}).messages  # type: ignore[union-attr]
    assert preference.value == 0 and preference.unread == ()


@pytest.mark.parametrize("form", FORMS)
def test_columns_that_belong_to_both_are_read(form: str) -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    row = FORMS[form] | {"system": "s", "tools": tools, "channel": "c", "margin": 1.5, "score": 3}
    preference = pair_of(row)
    for side in (preference, preference.other):
        assert (side.system, side.channel) == ("s", "c") and "f" in (side.tools or "")
    assert preference.value == 1.5 and preference.unread == ("score", "margin", "channel")


def test_texts_without_a_question_are_plain_text() -> None:
    preference = pair_of({"chosen": "Human: q Assistant: a", "rejected": "Human: q Assistant: b"})
    assert preference.is_text and preference.other.is_text  # type: ignore[union-attr]


def test_only_the_answers_that_differ_are_trained() -> None:
    first = [Q, A, Q, A]
    preference = pair_of({"chosen": first, "rejected": [Q, A, Q, B]})
    for side in (preference, preference.other):
        assert [message.loss for message in side.messages] == [None, False, None, None]  # type: ignore[union-attr]


def test_calls_and_their_results_are_parts_of_answers() -> None:
    call, other = ({"role": "tool_call", "content": json.dumps({"name": name, "arguments": {}})} for name in "fg")
    result = {"role": "tool", "content": "r"}
    after_question = pair_of({"messages": [Q, call, result, A], "rejected_messages": [Q, other, result, B]})
    for side in (after_question, after_question.other):
        assert [message.loss for message in side.messages] == [None] * 4  # type: ignore[union-attr]
    after_result = pair_of({"messages": [Q, call, result, A], "rejected_response": "b"})
    assert after_result == pair_of({"prompt": [Q, call, result], "chosen": [A], "rejected": "b"})
    assert [message.loss for message in after_result.messages] == [None, False, None, None]
    assert pair_of({"prompt": "q", "chosen": [call], "rejected": [A]}).messages[-1].role == "tool_call"


def test_columns_of_the_other_kind_are_not_read() -> None:
    row = FORMS["whole conversations"] | {"label": True, "margin": 1.0}
    assert pair_of(row).unread == ("label", "margin")
    chosen, rejected = to_preferences(row, None, "rated")
    assert chosen.unread == ("label", "margin") and rejected.unread == ()


def test_columns_are_renamed() -> None:
    row = {"Frage": "q", "gut": "a", "schlecht": "b"}
    preference = pair_of(row, {"frage": "prompt", "gut": "chosen", "schlecht": "rejected"})
    assert preference.messages[-1].content == "a" and preference.unread == ()


RATED: list[dict[str, Any]] = [
    {"prompt": "q", "completion": "a"},
    {"prompt": [Q], "completion": [A]},
    {"messages": [Q, A]},
    {"question": "q", "answer": "a"},
]


@pytest.mark.parametrize("label", [True, False, 1, 0])
@pytest.mark.parametrize("row", RATED)
def test_rated_rows_have_a_label(row: dict[str, Any], label: Any) -> None:
    (preference,) = to_preferences(row | {"label": label}, None, "rated")
    assert preference.messages == to_conversation({"messages": [Q, A]}).messages
    assert preference.value == float(label) and preference.other is None
    with pytest.raises(BadRow, match="no question"):
        to_preferences({"text": "a", "label": label}, None, "rated")


def test_the_last_round_of_a_rated_conversation_is_trained() -> None:
    call = {"role": "tool_call", "content": json.dumps({"name": "f", "arguments": {}})}
    row = {"messages": [Q, A, Q, call, {"role": "tool", "content": "r"}, A], "label": True}
    (preference,) = to_preferences(row, None, "rated")
    assert [message.loss for message in preference.messages] == [None, False, None, None, None, None]


def test_mismatched_answers_are_those_of_the_next_other_prompt() -> None:
    rows = [("a", "1"), ("a", "2"), ("b", "3"), ("c", "4"), ("c", "5")]
    rated = [
        preference
        for prompt, answer in rows
        for preference in to_preferences({"prompt": prompt, "completion": answer, "label": True}, None, "rated")
    ]
    found = list(mismatch_answers((answer, item) for (_, answer), item in zip(rows, rated, strict=True)))
    texts = [[message.content for message in item.other.messages] for _, item in found]
    assert [location for location, _ in found] == ["1", "2", "3", "4", "5"]
    assert texts == [["a", "3"], ["a", "3"], ["b", "4"], ["c", "1"], ["c", "1"]]
    ((_, alone),) = mismatch_answers([("1", rated[0])])
    assert alone.other.messages == rated[0].messages


def test_a_pair_is_two_rated_answers() -> None:
    chosen, rejected = to_preferences(FORMS["ShareGPT"], None, "rated")
    assert (chosen.messages[-1].content, chosen.value) == ("a", 1)
    assert (rejected.messages[-1].content, rejected.value) == ("b", 0)


FAULTS: list[tuple[Any, str]] = [
    (3, "not an object"),
    ({"prompt": "q", "chosen": "a", "rejected": "a"}, "identical answers"),
    ({"prompt": "q", "chosen": "a", "rejected": ""}, "empty answer"),
    ({"prompt": "q", "chosen": [], "rejected": "b"}, "empty answer"),
    ({"messages": [Q, A], "rejected_response": ""}, "empty answer"),
    ({"prompt": "q", "chosen": "a"}, "not two answers: no chosen and rejected"),
    ({"prompt": "q", "chosen": "a", "rejected": None}, "not two answers: no chosen and rejected"),
    ({"messages": [Q, A], "label": True}, "not two answers: no chosen and rejected"),
    ({"prompt": "q", "chosen": "a", "rejected": "b", "margin": "much"}, "margin is not a number"),
    ({"prompt": "q", "chosen": 3, "rejected": "b"}, "content"),
    ({"chosen": [A], "rejected": [B]}, "no question"),
    ({"chosen": "a", "rejected": [Q, B]}, "no question"),
    ({"prompt": [Q], "chosen": [{"role": "assistant", "content": ""}], "rejected": [B]}, "empty answer"),
    ({"messages": [Q, A], "chosen": "a", "rejected": "b"}, "an answer before chosen and rejected"),
    ({"prompt": [Q, A], "chosen": [A], "rejected": [B]}, "an answer before chosen and rejected"),
    ({"messages": [Q, A], "rejected_response": "b", "rejected_messages": [Q, B]}, "duplicate column"),
    ({"messages": [Q], "rejected_response": "b"}, "does not end with an answer"),
]


@pytest.mark.parametrize("number", range(len(FAULTS)))
def test_faulty_rows_are_refused_with_a_reason(number: int) -> None:
    row, reason = FAULTS[number]
    with pytest.raises(BadRow, match=reason):
        to_preferences(row, None, "pairs")


@pytest.mark.parametrize(
    "row", [{"prompt": "q", "completion": "a", "label": "good"}, {"prompt": "q", "completion": "a"}]
)
def test_rated_rows_need_a_label_of_true_or_false(row: dict[str, Any]) -> None:
    with pytest.raises(BadRow, match="no label of true or false"):
        to_preferences(row, None, "rated")
