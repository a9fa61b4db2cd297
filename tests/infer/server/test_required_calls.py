"""Calls that a request requires, calls in its history, and settings of single requests, with OpenAI's own client."""

import json
from dataclasses import replace
from typing import Any

import httpx
import jsonschema
import openai
import pytest

from litgpt.data.render.chat_template import ChatTemplate
from litgpt.infer.server.app import Server
from litgpt.infer.server.model import ServedModel
from litgpt.infer.server.schemas import ChatCompletion
from tests.infer.server.tiny_server import KEY

HELLO: list[Any] = [{"role": "user", "content": "the dog"}]
TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": "fetch",
            "parameters": {
                "type": "object",
                "properties": {"kind": {"$ref": "#/$defs/kind"}, "count": {"type": "integer", "maximum": 9}},
                "required": ["kind", "count"],
                "additionalProperties": False,
                "$defs": {"kind": {"enum": ["fox", "dog"]}},
            },
        },
    },
    {"type": "function", "function": {"name": "stop", "parameters": {"type": "object", "additionalProperties": False}}},
]


def call_of(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


def call_message(arguments: str) -> dict[str, Any]:
    function = {"name": "fetch", "arguments": arguments}
    return {"role": "assistant", "tool_calls": [{"id": "1", "type": "function", "function": function}]}


def nest_tool(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(depth):
        schema = {"a": schema}
    return {"type": "function", "function": {"name": "f", "parameters": schema}}


@pytest.fixture
def client(served: tuple[str, Server]) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served[0]}/v1", api_key=KEY, max_retries=0)


@pytest.mark.parametrize("choice", ["required", call_of("fetch")])
def test_a_required_call_follows_the_schema_of_its_tool(client: openai.OpenAI, choice: Any) -> None:
    settings: dict[str, Any] = {"model": "tiny", "messages": HELLO, "tools": TOOLS, "max_tokens": 80, "seed": 3}
    [whole] = client.chat.completions.create(**settings, tool_choice=choice).choices
    assert whole.finish_reason == "tool_calls" and whole.message.content is None
    [call] = whole.message.tool_calls or []
    schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in TOOLS}
    assert call.type == "function"
    jsonschema.validate(json.loads(call.function.arguments), schemas[call.function.name])
    assert choice == "required" or call.function.name == choice["function"]["name"]
    if choice != "required":
        return
    pieces = [
        chunk.choices[0].delta for chunk in client.chat.completions.create(**settings, tool_choice=choice, stream=True)
    ]
    assert "".join(piece.content or "" for piece in pieces) == ""
    [streamed] = [call for piece in pieces for call in piece.tool_calls or []]
    assert streamed.function and streamed.function.arguments == call.function.arguments
    [cut] = client.chat.completions.create(**{**settings, "max_tokens": 3}, tool_choice=choice).choices
    assert cut.finish_reason == "length" and not cut.message.tool_calls and cut.message.content


@pytest.mark.parametrize(
    ("written", "expected"),
    [("call.function.arguments.items() | list", "[('kind', 'fox')]"), ("'=' + call.function.arguments", '={"kind": ')],
)
def test_arguments_of_earlier_calls_are_objects_unless_a_template_joins_texts(
    served: tuple[str, Server], written: str, expected: str
) -> None:
    model, chat = served[1].model, served[1].model.encoder.chat
    assert chat is not None
    calls = f"{{% for call in message.tool_calls or [] %}}{{{{ {written} }}}}{{% endfor %}}<|eos|>"
    source = chat.sources[0].replace("<|eos|>", calls)
    encoder = replace(model.encoder, chat=ChatTemplate(source, chat.path))
    other = ServedModel("tiny", model.folder, model.engine, encoder, model.defaults)
    messages = [*HELLO, call_message('{"kind": "fox"}'), {"role": "tool", "content": "1", "tool_call_id": "1"}]
    prompt = other.start_chat(ChatCompletion(messages=messages)).requests[0].prompt
    assert expected in model.tokenizer.decode(list(prompt))


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ({"tool_choice": "required"}, "tool_choice: needs tools"),
        ({"tool_choice": "any"}, "tool_choice"),
        ({"tool_choice": "required", "tools": [{"type": "function"}]}, "a tool is not of the form"),
        ({"tool_choice": call_of("other"), "tools": TOOLS}, "'other' is not one of the tools fetch, stop"),
        (
            {"tool_choice": "required", "tools": TOOLS, "response_format": {"type": "json_object"}},
            "response_format: is not supported with a required call",
        ),
        ({"messages": [*HELLO, call_message("{")]}, "tool_calls.function.arguments: '{' is not a JSON object"),
        ({"tool_choice": call_of("f"), "tools": [{"function": {"name": "\ud800"}}]}, "is not one of the tools ?"),
        ({"top_k": -2}, "top_k: "),
        ({"tool_choice": "required", "tools": [nest_tool(480)]}, "tools"),
    ],
)
def test_wrong_calls_are_one_error(served: tuple[str, Server], body: dict[str, Any], text: str) -> None:
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    content = json.dumps({"messages": HELLO, **body})
    response = httpx.post(f"{served[0]}/v1/chat/completions", content=content, headers=headers, timeout=60)
    assert response.status_code == 400 and text in response.json()["error"]["message"]


def test_top_k_is_switched_off_for_a_request(client: openai.OpenAI, served: tuple[str, Server]) -> None:
    def ask(**more: Any) -> str:
        settings: dict[str, Any] = {"model": "tiny", "messages": HELLO, "max_tokens": 20, "seed": 1, "temperature": 5}
        return client.chat.completions.create(**settings, extra_body=more).choices[0].message.content or ""

    assert served[1].model.defaults.top_k == 50
    assert ask(top_k=-1) == ask(top_k=0) == ask(top_k=400) != ask()
