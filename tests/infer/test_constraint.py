"""Constraints: every text of a random model is valid under its JSON schema, or matches its regular expression."""

import json
import re
from typing import Any

import jsonschema
import pytest

from litgpt.data.tokenizer import Tokenizer, train_tokenizer
from litgpt.errors import UserError
from litgpt.infer.constraint import ConstraintCompiler, Form
from litgpt.infer.engine import Engine
from litgpt.infer.requests import Request
from litgpt.infer.sampling import Sampling
from tests.model.test_attention import small

pytest.importorskip("llguidance")
ROWS = 320
SHORT = {"type": "string", "maxLength": 5}
SCHEMAS: list[dict[str, Any]] = [
    {"type": "integer"},
    {"type": "integer", "minimum": -3, "maximum": 12},
    {"type": "number", "minimum": 0, "exclusiveMaximum": 1},
    {"type": "boolean"},
    {"type": "null"},
    {"const": {"a": [1, None]}},
    {"enum": ["red", "green", 3, None]},
    SHORT,
    {"type": "string", "minLength": 2, "maxLength": 4},
    {"type": "string", "pattern": "^[a-c]{2}-[0-9]{3}$"},
    {"type": "string", "format": "date"},
    {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 3},
    {"type": "array", "prefixItems": [{"type": "integer"}, SHORT], "items": False, "minItems": 2},
    {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False},
    {"type": "object", "properties": {"a": {"type": "null"}, "b": SHORT}, "additionalProperties": False},
    {
        "type": "object",
        "properties": {"at": {"$ref": "#/$defs/point"}},
        "required": ["at"],
        "additionalProperties": False,
        "$defs": {
            "point": {
                "type": "object",
                "properties": {"x": {"type": "integer"}, "y": {"type": "integer"}},
                "required": ["x", "y"],
                "additionalProperties": False,
            }
        },
    },
    {"anyOf": [{"type": "boolean"}, {"type": "array", "items": {"const": 0}, "maxItems": 2}]},
    {"allOf": [{"type": "integer", "minimum": 2}, {"maximum": 30}]},
    {"type": ["integer", "null"], "multipleOf": 5},
    {"type": "object", "maxProperties": 0},
    {"oneOf": [{"const": "yes"}, {"type": "integer", "minimum": 0, "maximum": 1}]},
]
REGEXES = [r"[ab]{2,5}", r"(yes|no)( indeed)?", r"[0-9]{4}-\s[0-9]{2}", r"[A-Z][a-z]{0,3}\.", r"x?y?z?"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    text = json.dumps({"name": "the book", "numbers": [1, 2, 3.5, -1e3], "flag": True, "none": None})
    return train_tokenizer([text] * 3, "bpe", 300, tmp_path_factory.mktemp("constraint") / "tokenizer")


def write_texts(tokenizer: Tokenizer, sources: list[tuple[Form, Any]], sampling: Sampling) -> list[str | None]:
    """A text under each constraint; None for those that do not end."""
    compiler = ConstraintCompiler(tokenizer, ROWS, tokenizer.stop_ids)
    model = small(vocab_size=ROWS, padded_vocab_size=ROWS, block_size=256)
    ends = frozenset(tokenizer.stop_ids)
    requests = [
        Request((5, 6), 250, sampling, ends, seed=number, constraint=compiler.compile(form, source))
        for number, (form, source) in enumerate(sources)
    ]
    return [
        tokenizer.decode([token.token for token in text.tokens]) if text.finish_reason == "stop" else None
        for text in Engine(model, max_sequences=64).run(requests)
    ]


def test_texts_of_a_random_model_are_valid_under_their_schemas(tokenizer: Tokenizer) -> None:
    assert tokenizer.id_limit < ROWS  # some rows of the model have no token
    schemas, sampling = SCHEMAS * 2, Sampling(logit_bias=dict.fromkeys(tokenizer.stop_ids, 3.0))  # numbers end soon
    texts = write_texts(tokenizer, [("json_schema", schema) for schema in schemas], sampling)
    for schema, text in zip(schemas, texts, strict=True):
        assert text is not None, schema
        jsonschema.validate(json.loads(text), schema, format_checker=jsonschema.FormatChecker())
    assert len({*texts}) > len(SCHEMAS)


def test_texts_match_their_regular_expressions(tokenizer: Tokenizer) -> None:
    texts = write_texts(tokenizer, [("regex", regex) for regex in REGEXES * 3], Sampling())
    for regex, text in zip(REGEXES * 3, texts, strict=True):
        assert text is not None
        assert re.fullmatch(regex, text), (regex, text)


def test_a_grammar_in_lark_and_greedy_decoding(tokenizer: Tokenizer) -> None:
    [text] = write_texts(tokenizer, [("lark", 'start: "a" digit digit\ndigit: /[0-9]/')], Sampling(0))
    assert text is not None
    assert re.fullmatch(r"a\d\d", text)


def test_any_json_object_begins_with_a_brace_and_ends_where_it_is_closed(tokenizer: Tokenizer) -> None:
    constraint = ConstraintCompiler(tokenizer, ROWS, tokenizer.stop_ids).compile("json_object")
    first = constraint.allowed().nonzero().flatten().tolist()
    assert first
    assert all(tokenizer.decode([token]).lstrip().startswith("{") for token in first)
    for token in tokenizer.encode('{"a": [1, {}]}', bos=False).tolist():
        assert constraint.allowed()[token]
        assert not constraint.allowed()[tokenizer.stop_ids[0]]
        constraint.accept(token)
    assert constraint.allowed()[tokenizer.stop_ids[0]]


def test_the_constraint_of_one_text_does_not_change_that_of_another(tokenizer: Tokenizer) -> None:
    compiler = ConstraintCompiler(tokenizer, ROWS, tokenizer.stop_ids)
    first, second = compiler.compile("regex", "ab"), compiler.compile("regex", "ab")
    start = second.allowed()
    first.accept(tokenizer.encode("a", bos=False).tolist()[0])
    assert not start.equal(first.allowed())
    assert start.equal(second.allowed())


@pytest.mark.parametrize(
    ("form", "source", "message"),
    [
        ("json_schema", "{", "json_schema: '{': Expecting property name"),
        ("json_schema", "[]", r"json_schema: '\[\]': not a JSON object; set an object"),
        ("json_schema", {"type": "whole"}, "Invalid type: whole; set another one"),
        ("json_schema", {"not": {"type": "string"}}, r'Unimplemented keys: \["not"\]'),
        ("regex", "([", r"regex: '\(\[': .*unclosed character class"),
        ("lark", "start: foo", "lark: 'start: foo': .*unknown name"),
    ],
)
def test_wrong_grammars_are_one_line(tokenizer: Tokenizer, form: Form, source: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        ConstraintCompiler(tokenizer, ROWS, tokenizer.stop_ids).compile(form, source)
    assert "\n" not in str(caught.value)


def test_a_token_that_may_not_follow_and_a_tokenizer_without_stop_tokens_are_refused(tokenizer: Tokenizer) -> None:
    constraint = ConstraintCompiler(tokenizer, ROWS, tokenizer.stop_ids).compile("regex", "b+")
    with pytest.raises(UserError, match="regex: 'token 0': "):
        constraint.accept(0)
    with pytest.raises(UserError, match="has no stop token"):
        ConstraintCompiler(tokenizer, ROWS, [])


def test_tokenizers_of_sentencepiece_are_refused(tokenizer: Tokenizer) -> None:
    other = Tokenizer(tokenizer.folder)
    other.backend = "sentencepiece"
    with pytest.raises(UserError, match=r"needs tokenizer\.json"):
        ConstraintCompiler(other, ROWS, [1])
