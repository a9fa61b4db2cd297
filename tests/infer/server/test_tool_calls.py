"""Calls in the formats of several models are read from the text, whole and token by token, and what is not stays."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken

from litgpt.data.render.chat_template import ChatTemplate
from litgpt.data.token_bytes import get_token_bytes
from litgpt.data.tokenizer import Tokenizer, train_tokenizer
from litgpt.infer.requests import GeneratedToken
from litgpt.infer.server.errors import ApiError
from litgpt.infer.server.texts import AnswerText, CallReader
from litgpt.infer.server.tool_calls import build_call_schema, find_call_format, parse_arguments

TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {"name": "f", "parameters": {"properties": {"a": {"type": "string"}, "b": {"type": "integer"}}}},
    }
]
ARGUMENTS = {"a": "1 <Köln>", "b": 2}
OBJECT = json.dumps({"name": "f", "arguments": ARGUMENTS})
LLAMA = json.dumps({"name": "f", "parameters": ARGUMENTS})
XML = "\n<function=f>\n<parameter=a>\n1 <Köln>\n</parameter>\n<parameter=b>\n2\n</parameter>\n</function>\n"
MARKS = ("<tool_call>", "</tool_call>", "[TOOL_CALLS]", "<|python_tag|>")
TEMPLATES = {
    "hermes": "<tool_call>{{ call }}</tool_call>",
    "mistral": "[TOOL_CALLS]{{ calls }}",
    "llama": 'ipython {"name": "", "parameters": {}}',
    "coder": "<tool_call><function=f><parameter=a>",
}
# A text, what is shown of it, and the number of calls in it.
TEXTS = {
    "hermes": [
        (f"So <tool_call>\n{OBJECT}\n</tool_call>", "So ", 1),
        (f"<tool_call>{OBJECT}</tool_call>\n<tool_call>{OBJECT}</tool_call>", "", 2),
        ("a <tool_call> b", "a <tool_call> b", 0),
        ("<tool_call>{}</tool_call>", "<tool_call>{}</tool_call>", 0),
        ("<tool_call>1</tool_call>", "<tool_call>1</tool_call>", 0),
    ],
    "mistral": [
        (f"So [TOOL_CALLS][{OBJECT}, {OBJECT}]", "So ", 2),
        (f"[TOOL_CALLS] [{OBJECT}]", "", 1),
        ("[TOOL_CALLS] none", "[TOOL_CALLS] none", 0),
    ],
    "llama": [
        (f"<|python_tag|>{LLAMA}; {LLAMA}", "", 2),
        (f" {LLAMA}", "", 1),
        ('{"a": 1}', '{"a": 1}', 0),
        ("It is {1}", "It is {1}", 0),
    ],
    "coder": [
        (f"So <tool_call>{XML}</tool_call>", "So ", 1),
        ("<tool_call><function=f></tool_call>", "<tool_call><function=f></tool_call>", 0),
    ],
}


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Tokenizer]:
    """A tokenizer whose marks are special tokens, which decoding leaves out, and one without them."""
    made = {}
    for has_marks in (True, False):
        folder = tmp_path_factory.mktemp("tokenizer")
        train_tokenizer(["the fox jumps over a lazy dog"] * 20, "bpe", 300, folder)
        if has_marks:
            processor = Tokenizer(folder).processor
            processor.add_special_tokens([AddedToken(t) for t in MARKS])
            processor.save(str(folder / "tokenizer.json"))
        made[has_marks] = Tokenizer(folder)
    return made


def make_reader(name: str, **settings: Any) -> CallReader:
    form = find_call_format(ChatTemplate(TEMPLATES[name], Path("chat_template.jinja")))
    assert form is not None
    return CallReader(form, TOOLS, **settings)


@pytest.mark.parametrize("has_marks", [True, False])
@pytest.mark.parametrize("name", TEXTS)
def test_calls_are_read_as_their_tokens_arrive(name: str, has_marks: bool, tokenizers: dict[bool, Tokenizer]) -> None:
    tokenizer = tokenizers[has_marks]
    for text, shown, count in TEXTS[name]:
        answer = AnswerText(tokenizer, (), [], make_reader(name))
        *ids, last = tokenizer.encode(text, bos=False).tolist()
        pieces = [answer.push(GeneratedToken(token)) for token in ids]
        pieces.append(answer.push(GeneratedToken(last, finish_reason="length")))
        assert "".join(pieces) == answer.text == shown, text
        assert answer.finish_reason == ("tool_calls" if count else "length")
        functions = [call["function"] for call in answer.calls]
        assert [(call["name"], json.loads(call["arguments"])) for call in functions] == [("f", ARGUMENTS)] * count


def test_text_without_tools_is_text(tokenizers: dict[bool, Tokenizer]) -> None:
    text = f"<tool_call>{OBJECT}</tool_call>"
    answer = AnswerText(tokenizers[False], (), [])
    for token in tokenizers[False].encode(text, bos=False).tolist():
        answer.push(GeneratedToken(token))
    assert answer.text == text and not answer.calls


def test_a_stop_string_before_a_call_ends_the_answer(tokenizers: dict[bool, Tokenizer]) -> None:
    tokenizer = tokenizers[True]
    answer = AnswerText(tokenizer, (), ["o <"], make_reader("hermes"))
    for token in tokenizer.encode(f"So <tool_call>{OBJECT}</tool_call>", bos=False).tolist():
        answer.push(GeneratedToken(token))
    answer.push(GeneratedToken(tokenizer.eos_id or 0, finish_reason="stop"))
    assert answer.text == "So " and len(answer.calls) == 1  # the mark is a token, not the text that a stop string is in


def test_unknown_templates_have_no_format() -> None:
    assert find_call_format(ChatTemplate("{{ tools }}", Path("chat_template.jinja"))) is None


def test_schemas_of_required_calls() -> None:
    reader = make_reader("mistral")
    schema = build_call_schema(TOOLS, "f", reader.form)
    assert schema["type"] == "array" and schema["items"]["anyOf"][0]["properties"]["name"] == {"const": "f"}
    moved = [{"type": "function", "function": {"name": "g", "parameters": {"$ref": "#/$defs/a"}}}]
    [call] = build_call_schema(moved, None, make_reader("llama").form)["anyOf"]
    assert call["properties"]["parameters"]["$ref"] == "#/anyOf/0/properties/parameters/$defs/a"
    with pytest.raises(ApiError, match="'h' is not one of the tools f"):
        build_call_schema(TOOLS, "h", None)


def test_arguments_of_earlier_calls_become_objects() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": "é"}'}}
    parsed = parse_arguments({"role": "assistant", "tool_calls": [call]})["tool_calls"][0]
    assert parsed == {**call, "function": {"name": "f", "arguments": {"a": "é"}}}
    for odd in (None, [None], [{"function": 1}], [{"function": {"arguments": {}}}]):
        assert parse_arguments({"tool_calls": odd}) == {"tool_calls": odd}


def test_bytes_of_parts_of_characters(tokenizers: dict[bool, Tokenizer]) -> None:
    for text in ("é你😀", "the fox \x80"):
        ids = tokenizers[False].encode(text, bos=False).tolist()
        parts = [get_token_bytes(tokenizers[False], token) for token in ids]
        assert b"".join(parts) == text.encode() and (text == "the fox \x80" or len(parts) > len(text))
