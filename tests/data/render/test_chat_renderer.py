"""Conversations as tokens: text, numbers and masks are transformers' own, and what is trained is what was answered."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from litgpt.data.read.conversation import Conversation, to_conversation
from litgpt.data.read.fields import BadRow
from litgpt.data.read.message import Message
from litgpt.data.render.chat_renderer import ChatRenderer, LossMask
from litgpt.data.render.chat_template import ChatTemplate, read_template
from litgpt.data.render.example import Example
from litgpt.data.render.loss_weights import WeightRule, split_by_weight
from litgpt.data.render.turns import build_turns
from litgpt.errors import UserError
from tests.data.templates import KINDS, write_tokenizer

SIX = ["chatml", "llama3", "mistral", "gemma", "phi3", "qwen3"]
# Mistral's writes the system's text into the last message, if that is a question
NO_SYSTEM = {"gemma": "the chat template rejects it", "mistral": "the chat template omits the system message"}
ANSWERS = ["Hello! How are you?", "forty two\n\nGood.", " é 日本 😀", "42"]
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "é": [1, None]}}}]


class Folder:
    """A tokenizer of one kind, ours and transformers'."""

    def __init__(self, folder: Path, kind: str) -> None:
        self.kind, self.tokenizer = kind, write_tokenizer(folder, kind)
        self.theirs = PreTrainedTokenizerFast.from_pretrained(folder)
        self.end = KINDS[kind][3]

    def renderer(self, trained: LossMask | None = None, **variables: Any) -> ChatRenderer:
        template = read_template(self.tokenizer.folder)
        assert template is not None
        return ChatRenderer(self.tokenizer, template, trained, variables)

    def example(self, conversation: Conversation, trained: LossMask | None = None) -> Example:
        (result,) = self.renderer(trained).build_examples([conversation])
        assert isinstance(result, Example), result
        return result

    def trained_text(self, example: Example) -> list[str]:
        """The runs of tokens that are trained, as text."""
        groups = itertools.groupby(zip(example.ids, example.weights, strict=True), key=lambda pair: pair[1] > 0)
        runs = [[int(number) for number, _ in group] for trained, group in groups if trained]
        return [self.tokenizer.processor.decode(run, skip_special_tokens=False) for run in runs]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Folder]:
    return {kind: Folder(tmp_path_factory.mktemp(kind), kind) for kind in KINDS}


def talk(turns: int, system: str | None = None) -> Conversation:
    messages: list[Message] = []
    for number in range(turns):
        messages += [Message("user", f"question {number} \n"), Message("assistant", ANSWERS[number])]
    return Conversation(tuple(messages), system)


def parse_message(conversation: Conversation) -> list[dict[str, Any]]:
    return [turn.message for turn in build_turns(conversation)]


def expected(folder: Folder, conversation: Conversation) -> list[str]:
    strips = folder.kind in ("llama3", "gemma")
    said = [message.content for message in conversation.messages if message.role == "assistant"]
    written = [(text.strip() if strips else text) + folder.end for text in said]
    if folder.kind == "mistral":
        written = [" " + text for text in written]
    if folder.kind == "qwen3":  # the template writes no reasoning as empty reasoning, in the last answer only
        written[-1] = "<think>\n\n</think>\n\n" + written[-1]
    return written


@pytest.mark.parametrize("turns", [1, 2, 3, 4])
@pytest.mark.parametrize("system", [None, "Be brief."])
@pytest.mark.parametrize("kind", [*SIX, "marked"])
def test_text_and_tokens_are_transformers_own(
    folders: dict[str, Folder], kind: str, system: str | None, turns: int
) -> None:
    folder, conversation = folders[kind], talk(turns, system)
    if kind in NO_SYSTEM and system:
        (refused,) = folder.renderer().build_examples([conversation])
        assert isinstance(refused, BadRow) and refused.reason == NO_SYSTEM[kind]
        assert ("System role not supported" if kind == "gemma" else system) in refused.detail
        return
    text, _ = folder.renderer().render(conversation)
    messages = parse_message(conversation)
    assert text == folder.theirs.apply_chat_template(messages, tokenize=False)
    example = folder.example(conversation)
    assert example.ids.tolist() == folder.theirs.apply_chat_template(messages)["input_ids"]
    assert example.ids.tolist() == folder.theirs(text, add_special_tokens=False)["input_ids"]
    # what the model reads before it answers is how the sample begins
    prompt = folder.theirs.apply_chat_template(messages[:-1], add_generation_prompt=True)["input_ids"]
    if kind != "qwen3" or turns == 1:  # it writes earlier turns otherwise
        assert example.ids[: len(prompt)].tolist() == prompt
        assert not example.weights[: len(prompt)][-1] and example.weights[len(prompt)]


@pytest.mark.parametrize("turns", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", [*SIX, "marked"])
def test_answers_and_their_ends_are_trained(folders: dict[str, Folder], kind: str, turns: int) -> None:
    folder, conversation = folders[kind], talk(turns)
    wanted = expected(folder, conversation)
    end = len(folder.end)
    for policy, kept in {
        "turn": wanted,
        "last": [*(text[:-end] for text in wanted[:-1]), wanted[-1]],
        "none": [text[:-end] for text in wanted],
    }.items():
        example = folder.example(conversation, LossMask(end_of_turn=policy))
        assert folder.trained_text(example) == kept
    last = folder.example(conversation, LossMask(on="last_answer"))
    assert folder.trained_text(last) == wanted[-1:]
    everything = folder.example(conversation, LossMask(on="everything"))
    assert (everything.weights == 1).all()


@pytest.mark.parametrize("turns", [1, 2, 3, 4])
def test_marked_answers_are_transformers_mask(folders: dict[str, Folder], turns: int) -> None:
    folder, conversation = folders["marked"], talk(turns, "Be brief.")
    expected = folder.theirs.apply_chat_template(
        parse_message(conversation), return_assistant_tokens_mask=True, return_dict=True
    )
    assert folder.example(conversation).weights.tolist() == expected["assistant_masks"]
    assert sum(expected["assistant_masks"]) > 5 * turns


def test_marks_and_placeholders_find_equal_spans(folders: dict[str, Folder]) -> None:
    conversation = talk(3, "Be brief.")
    for trained in (LossMask(), LossMask(end_of_turn="none"), LossMask(end_of_turn="last"), LossMask("last_answer")):
        one, other = (folders[kind].example(conversation, trained) for kind in ("chatml", "marked"))
        assert np.array_equal(one.weights, other.weights) and np.array_equal(one.ids, other.ids)


REASONED = Conversation(
    (
        Message("user", "question"),
        Message("assistant", "<think>\nhm\n</think>\n\nthe fox"),
        Message("user", "and then"),
        Message("assistant", "<think>\nit jumps\n</think>\n\nthe dog"),
    )
)


def test_reasoning_that_a_template_leaves_out_of_earlier_answers(folders: dict[str, Folder]) -> None:
    folder = folders["qwen3"]
    example = folder.example(REASONED)
    assert folder.trained_text(example) == ["the fox<|im_end|>", "<think>\nit jumps\n</think>\n\nthe dog<|im_end|>"]
    apart = Conversation(
        (Message("user", "q"), Message("assistant", "the fox", fields={"reasoning_content": "it jumps"}))
    )
    written = "<think>\nit jumps\n</think>\n\nthe fox<|im_end|>"
    assert folder.trained_text(folder.example(apart)) == [written]


CALLS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "add"},
    {
        "role": "assistant",
        "content": "I add.",
        "tool_calls": [
            {"type": "function", "function": {"name": "add", "arguments": {"b": 'q"\n', "a": "é"}}},
            {"type": "function", "function": {"name": "add", "arguments": {}}},
        ],
    },
    {"role": "tool", "content": "2"},
    {"role": "tool", "content": "3"},
    {"role": "assistant", "content": "the answer"},
]


def test_tools_and_calls(folders: dict[str, Folder]) -> None:
    folder = folders["qwen3"]
    conversation = to_conversation({"messages": CALLS, "tools": json.dumps(TOOLS)})
    text, _ = folder.renderer().render(conversation)
    assert text == folder.theirs.apply_chat_template(CALLS, tools=TOOLS, tokenize=False)
    called = '<tool_call>\n{"name": "add", "arguments": {"b": "q\\"\\n", "a": "é"}}\n</tool_call>'
    assert folder.trained_text(folder.example(conversation)) == [
        "I add.\n" + called + '\n<tool_call>\n{"name": "add", "arguments": {}}\n</tool_call><|im_end|>',
        "<think>\n\n</think>\n\nthe answer<|im_end|>",
    ]
    last = folder.example(conversation, LossMask(on="last_answer"))
    assert len(folder.trained_text(last)) == 1  # what follows the tools' results


def test_messages_that_say_loss(folders: dict[str, Folder]) -> None:
    folder, whole = folders["chatml"], talk(3)
    messages = list(whole.messages)
    messages[1] = Message("assistant", ANSWERS[0], loss=False)
    messages[5] = Message("assistant", ANSWERS[2], weight=2.0)
    said = expected(folder, whole)
    example = folder.example(Conversation(tuple(messages), weight=0.5))
    assert folder.trained_text(example) == said[1:]
    assert set(example.weights.tolist()) == {0.0, 0.5, 1.0}
    last = Conversation((messages[0], messages[1]))
    for on in ("answers", "last_answer", "everything"):
        weights = folder.example(last, LossMask(on)).weights
        answer = folder.theirs(said[0], add_special_tokens=False)["input_ids"]
        place = len(weights) - len(answer) - 1  # the line end stands behind it
        assert not weights[place : place + len(answer)].any()
        assert (weights[:place] == (on == "everything")).all()
    messages[2] = Message("user", "question 1", loss=True)
    assert "question 1" in "".join(folder.trained_text(folder.example(Conversation(tuple(messages)))))


def test_every_format_is_written_alike(folders: dict[str, Folder]) -> None:
    said = [{"role": "user", "content": "q\nr"}, {"role": "assistant", "content": "a"}]
    forms: list[dict[str, Any]] = [
        {"system": "s", "messages": said},
        {"messages": [{"role": "system", "content": "s"}, *said]},
        {"system": "s", "conversations": [{"from": "human", "value": "q\nr"}, {"from": "gpt", "value": "a"}]},
        {"system": "s", "conversation": [{"human": "q\nr", "assistant": "a"}]},
        {"system": "s", "messages": json.dumps(said)},
        {"system": "s", "messages": [{"role": one["role"], "content": [one["content"]]} for one in said]},
        {"system": "s", "instruction": "q", "input": "r", "output": "a"},
        {"system_prompt": "s", "question": "q\nr", "answers": ["a"]},
    ]
    texts = {folders["chatml"].renderer().render(to_conversation(row))[0] for row in forms}
    kept = to_conversation(forms[6], format="instruction")
    assert texts == {folders["chatml"].renderer().render(kept)[0]} and "q\nr" in texts.pop()


def test_plain_text_stands_between_begin_and_end(folders: dict[str, Folder]) -> None:
    folder = folders["llama3"]
    example = folder.example(to_conversation({"text": "the quick brown fox"}))
    assert folder.tokenizer.processor.decode(example.ids.tolist(), skip_special_tokens=False) == (
        "the quick brown fox<|end_of_text|>"
    )
    assert (example.weights == 1).all()


def test_answers_that_look_like_the_template(folders: dict[str, Folder]) -> None:
    """Words of the template inside an answer, equal answers, blanks and nothing at all do not move the spans."""
    folder = folders["chatml"]
    odd = ["a", "a", "assistant\na", "", " ", "\n", "<|im_end|>\nx", "user\n", "\U000f8a33"]
    for pair in itertools.product(odd, repeat=2):
        turns = [
            Message("user", "a"),
            Message("assistant", pair[0]),
            Message("user", ""),
            Message("assistant", pair[1]),
        ]
        text, parts = folder.renderer().render(Conversation(tuple(turns)))
        result = [text[part.start : part.stop] for part in parts if part.weight]
        assert result == [said + "<|im_end|>" for said in pair]


def test_template_that_leaves_answers_out(tmp_path: Path) -> None:
    tokenizer = write_tokenizer(tmp_path, "chatml")
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}<|im_end|>{{ messages[-1].content }}")
    template = read_template(tmp_path)
    assert template is not None
    (result,) = ChatRenderer(tokenizer, template).build_examples([talk(2)])
    assert isinstance(result, BadRow) and result.reason == "the chat template omits an answer"


SILENT = {
    "tools": "{% for m in messages %}{{ m.role + ': ' + m.content + '<|im_end|>' }}{% endfor %}",
    "tool calls": "{{ tools }}{% for m in messages %}{{ m.role + ': ' + m.content + '<|im_end|>' }}{% endfor %}",
    "the system message": "{% for m in messages if m.role != 'system' %}{{ m.content + eos_token }}{% endfor %}",
}


@pytest.mark.parametrize("what", SILENT)
def test_templates_that_leave_out_what_they_cannot_write(tmp_path: Path, what: str) -> None:
    tokenizer = write_tokenizer(tmp_path, "chatml")
    (tmp_path / "chat_template.jinja").write_text(SILENT[what])
    template = read_template(tmp_path)
    assert template is not None
    tools = [] if "system" in what else TOOLS
    messages = [CALLS[0], CALLS[1], CALLS[5]] if "system" in what else CALLS
    (result,) = ChatRenderer(tokenizer, template).build_examples(
        [to_conversation({"messages": messages, "tools": tools})]
    )
    assert isinstance(result, BadRow) and result.reason == f"the chat template omits {what}"


def test_replies_that_continue_after_a_result(tmp_path: Path) -> None:
    """Where a reply has no header of its own after a tool's result, the result is not taken for a part of it."""
    tokenizer = write_tokenizer(tmp_path, "chatml")
    (tmp_path / "chat_template.jinja").write_text(
        "{% for m in messages %}{% if m.role == 'user' %}<|user|>{{ m.content }}<|assistant|>"
        "{% elif m.role == 'tool' %}<|system|>{{ m.content }}<|end|>{% elif m.tool_calls %}"
        "{{ m.tool_calls[0].function.name }}<|im_end|>{% else %}{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
    )
    template = read_template(tmp_path)
    assert template is not None
    conversation = to_conversation({"messages": [CALLS[1], {**CALLS[2], "content": ""}, CALLS[3], CALLS[5]]})
    renderer = ChatRenderer(tokenizer, template)
    text, parts = renderer.render(conversation)
    trained = [text[part.start : part.stop] for part in parts if part.weight]
    assert trained == ["add<|im_end|>", "the answer<|im_end|>"]


@pytest.mark.parametrize(
    "source", ["{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}", "{{ 1 / 0 }}", "{{ x.y }}"]
)
def test_hostile_templates_cost_a_row_not_the_run(tmp_path: Path, source: str) -> None:
    tokenizer = write_tokenizer(tmp_path, "chatml")
    (tmp_path / "chat_template.jinja").write_text(source)
    template = read_template(tmp_path)
    assert template is not None
    (result,) = ChatRenderer(tokenizer, template).build_examples([talk(1)])
    assert isinstance(result, BadRow)


# a text, the rules, and (part, weight) of what becomes of it
THINK = WeightRule(0.0, regex=r"^<think>\s*</think>\s*")
REACT = (
    WeightRule(2, keyword="Action:", following_weight=2),
    WeightRule(2, keyword="Action Input:", following_weight=2),
    WeightRule(1, keyword="Thought:", following_weight=1),
    WeightRule(2, keyword="Observation:", following_weight=0),
)
WEIGHTED: list[tuple[str, tuple[WeightRule, ...], list[tuple[str, float]]]] = [
    ("plain", (), [("plain", 1.0)]),
    ("", REACT, [("", 1.0)]),
    ("plain", REACT, [("plain", 1.0)]),
    ("<think>\n</think>\n\nyes", (THINK,), [("<think>\n</think>\n\n", 0.0), ("yes", 1.0)]),
    ("<think>so</think>yes", (THINK,), [("<think>so</think>yes", 1.0)]),
    ("a <call>x</call> b", (WeightRule(2, regex="<call>.+?</call>"),), [("a ", 1), ("<call>x</call>", 2), (" b", 1)]),
    ("<c>\n</c>", (WeightRule(2, regex="<c>.+?</c>"),), [("<c>\n</c>", 2)]),
    ("<c></c>", (WeightRule(2, regex="<c>.+?</c>"),), [("<c></c>", 1)]),
    ("abab", (WeightRule(3, regex="b"),), [("a", 1), ("b", 3), ("a", 1), ("b", 3)]),
    ("ab", (WeightRule(3, regex="b"), WeightRule(2, regex="ab")), [("a", 2), ("b", 6)]),
    ("Thought: x", REACT, [("Thought: x", 1)]),
    ("Action: f", REACT, [("Action: f", 2)]),
    ("Thought: t\nAction: f", REACT, [("Thought: t\n", 1), ("Action: f", 2)]),
    ("Action: f\nAction Input: {}", REACT, [("Action: f\nAction Input: {}", 2)]),
    ("Action: f\nObservation: 2", REACT, [("Action: f\nObservation:", 2), (" 2", 0)]),
    ("Observation: 2\nThought: t", REACT, [("Observation:", 2), (" 2\n", 0), ("Thought: t", 1)]),
    ("xAction:", REACT, [("x", 1), ("Action:", 2)]),
    ("a.b", (WeightRule(2, keyword="."),), [("a", 1), (".", 2), ("b", 1)]),
    ("a.b", (WeightRule(2, keyword=".", following_weight=0),), [("a", 1), (".", 2), ("b", 0)]),
    ("aXYb", (WeightRule(2, keyword="X"), WeightRule(3, keyword="XY")), [("a", 1), ("XY", 3), ("b", 1)]),
]


@pytest.mark.parametrize("number", range(len(WEIGHTED)))
def test_weights_by_pattern(number: int) -> None:
    text, rules, wanted = WEIGHTED[number]
    assert [(text[low:high], weight) for low, high, weight in split_by_weight(text, rules)] == wanted


def test_weights_reach_the_tokens(folders: dict[str, Folder]) -> None:
    conversation = Conversation((Message("user", "fox"), Message("assistant", "the fox, the dog")))
    rules = (WeightRule(2, keyword="fox"), WeightRule(0, regex="dog"))
    folder = folders["chatml"]
    example = folder.example(conversation, LossMask(weights=rules))
    decoded = {
        weight: folder.tokenizer.processor.decode(example.ids[example.weights == weight].tolist())
        for weight in (0.0, 1.0, 2.0)
    }
    assert decoded[2.0].strip() == "fox" and decoded[0.0].endswith(" dog\n") and decoded[1.0].startswith("the")


@pytest.mark.parametrize("rule", [{}, {"regex": "a", "keyword": "b"}, {"regex": "("}, {"keyword": ""}])
def test_invalid_rules(rule: dict[str, str]) -> None:
    with pytest.raises(UserError, match=r"data\.weights"):
        WeightRule(1.0, **rule)


NAMES = (
    "{% for m in messages %}<|im_start|>{{ m.role }}{% if m.name %} {{ m.name }}{% endif %}\n{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}[{{ c.id }} {{ c.function.name }}]{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WHOLE = "{% for m in messages %}<|im_start|>{{ m | tojson }}<|im_end|>\n{% endfor %}"
# a template, and which fields of the row it does not read
READERS = {
    NAMES: ["messages.thinking", "messages.tool_call_id", "messages.refused"],
    WHOLE: [],
    NAMES + "{{ messages[1].thinking }}": ["messages.tool_call_id", "messages.refused"],
    NAMES + "{{ messages[1]['reasoning'] }}": ["messages.tool_call_id", "messages.refused"],
    NAMES + "{{ messages[1].get('reasoning_content') }}": ["messages.tool_call_id", "messages.refused"],
}


@pytest.mark.parametrize("source", READERS)
def test_fields_arrive_at_the_template_and_the_others_are_listed(folders: dict[str, Folder], source: str) -> None:
    calls = [{"id": "abc", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "q", "name": "Ada"},
        {"role": "assistant", "content": None, "thinking": "hm", "tool_calls": calls},
        {"role": "tool", "content": "2", "tool_call_id": "abc", "name": "add"},
        {"role": "assistant", "content": "two", "name": "Bob", "refused": False},
    ]
    folder = folders["chatml"]
    renderer = ChatRenderer(folder.tokenizer, ChatTemplate(source, Path("chat.jinja")))
    conversation = to_conversation({"messages": messages})
    text, _ = renderer.render(conversation)
    if source == WHOLE:
        assert text == "".join(f"<|im_start|>{json.dumps(message)}<|im_end|>\n" for message in messages)
    else:  # transformers knows the reasoning under every name but the last
        named = [{name.replace("thinking", "reasoning"): value for name, value in item.items()} for item in messages]
        wanted = named if "'reasoning'" in source else messages
        assert text == folder.theirs.apply_chat_template(wanted, chat_template=source, tokenize=False)
    assert renderer.list_unread(conversation) == READERS[source]
    if source == NAMES:  # the name in the header of an answer is not trained
        trained = folder.trained_text(renderer.build_examples([conversation])[0])  # type: ignore[arg-type]
        assert trained == ["[abc add]<|im_end|>", "two<|im_end|>"]


@pytest.mark.parametrize(
    ("content", "written"),
    [
        ("{{ m.content }}", ""),  # a template that would write None gets an empty text
        ("{{ '' + m.content }}", ""),  # and one that rejects it
        ("{{ 'calls' if m.content is none else m.content }}", "calls"),
    ],
)
def test_a_content_that_is_null(folders: dict[str, Folder], content: str, written: str) -> None:
    source = "{% for m in messages %}<|im_start|>" + content + "{{ m.tool_calls or '' }}<|im_end|>{% endfor %}"
    renderer = ChatRenderer(folders["chatml"].tokenizer, ChatTemplate(source, Path("chat.jinja")))
    call = {"function": {"name": "f", "arguments": {}}}
    row = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": None, "tool_calls": [call]}]}
    text, _ = renderer.render(to_conversation(row))
    assert text.startswith(f"<|im_start|>q<|im_end|><|im_start|>{written}[{{'type'")
