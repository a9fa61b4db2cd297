"""The server with OpenAI's own client: answers, streams, tools, limits, errors, and clients that leave."""

import asyncio
import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import openai
import pytest

from litgpt.errors import UserError
from litgpt.infer.constraint import GrammarConstraint
from litgpt.infer.server.app import Server
from tests.infer.server.tiny_server import KEY, wait_until_idle

CLIENT = httpx.Client(timeout=60, trust_env=False)  # one for all, because each makes its own TLS context
HELLO: list[Any] = [{"role": "user", "content": "the dog"}]


@pytest.fixture
def client(served: tuple[str, Server]) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served[0]}/v1", api_key=KEY, max_retries=0)


def post(served: tuple[str, Server], path: str, body: Any, key: str = KEY) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    return CLIENT.post(served[0] + path, content=content, headers=headers)


def test_a_streamed_chat_equals_a_whole_one(client: openai.OpenAI) -> None:
    settings: dict[str, Any] = {"model": "tiny", "messages": HELLO, "seed": 5, "n": 2, "max_tokens": 20}
    whole = client.chat.completions.create(**settings)
    texts = ["", ""]
    reasons: list[Any] = [None, None]
    usage = None
    for chunk in client.chat.completions.create(**settings, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    assert texts == [choice.message.content for choice in whole.choices] and texts[0] != texts[1]
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert usage == whole.usage and usage is not None and usage.completion_tokens >= 20
    again = client.chat.completions.create(**settings)
    assert [choice.message.content for choice in again.choices] == texts


def test_completions_of_several_prompts_with_log_probabilities(client: openai.OpenAI) -> None:
    settings: dict[str, Any] = {"model": "tiny", "temperature": 0, "max_tokens": 6, "logprobs": 2}
    both = client.completions.create(prompt=["the dog", "a fox"], **settings)
    alone = [client.completions.create(prompt=prompt, **settings).choices[0] for prompt in ("the dog", "a fox")]
    assert [choice.text for choice in both.choices] == [choice.text for choice in alone]
    logprobs = alone[0].logprobs
    assert logprobs is not None and logprobs.token_logprobs is not None and len(logprobs.token_logprobs) == 6
    assert all(value is not None and value <= 0 for value in logprobs.token_logprobs)
    echoed = client.completions.create(prompt="the dog", echo=True, **{**settings, "logprobs": None})
    assert echoed.choices[0].text == "the dog" + alone[0].text
    stop = alone[0].text[3:5]
    stopped = client.completions.create(prompt="the dog", stop=[stop], **settings).choices[0]
    assert stopped.text == alone[0].text[: alone[0].text.index(stop)] and stopped.finish_reason == "stop"
    chat = client.chat.completions.create(
        model="tiny", messages=HELLO, logprobs=True, top_logprobs=3, max_tokens=4, temperature=0
    )
    content = chat.choices[0].logprobs and chat.choices[0].logprobs.content
    assert content is not None and len(content) == 4 and all(len(item.top_logprobs) == 3 for item in content)
    assert all(item.top_logprobs[0].logprob == pytest.approx(item.logprob) for item in content)


def test_answers_have_the_form_of_a_schema(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"kind": {"enum": ["fox", "dog"]}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
        "required": ["kind", "age"],
        "additionalProperties": False,
    }
    form: Any = {"type": "json_schema", "json_schema": {"name": "animal", "schema": schema}}
    answer = client.chat.completions.create(model="tiny", messages=HELLO, response_format=form, max_tokens=60, seed=1)
    jsonschema.validate(json.loads(answer.choices[0].message.content or ""), schema)


def test_models_health_metrics_and_the_route_of_litgpt(client: openai.OpenAI, served: tuple[str, Server]) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"] == [client.models.retrieve("tiny").id]
    assert httpx.get(f"{served[0]}/health").json() == {"status": "ok"}
    response = post(served, "/predict", {"prompt": "the dog"})
    assert response.status_code == 200 and set(response.json()) == {"output"}
    metrics = httpx.get(f"{served[0]}/metrics", headers={"Authorization": f"Bearer {KEY}"}).text
    assert 'litgpt_requests_total{route="/predict",status="200"}' in metrics and "litgpt_waiting 0.0" in metrics


@pytest.mark.parametrize(
    ("body", "status", "text"),
    [
        ({"model": "other"}, 404, "The model 'other' does not exist; use 'tiny'"),
        ({"messages": [{"role": "user", "content": "dog " * 400}]}, 400, "exceed the model's context of 256"),
        ({"max_tokens": 5000}, 400, "max_new_tokens: 5000 after a prompt"),
        ({"messages": []}, 400, "messages: "),
        ({"temperature": "hot"}, 400, "temperature: "),
        ({"best_of": 3}, 400, "best_of: "),
        ({"logit_bias": {"99999": 1}}, 400, "logit_bias"),
        ({"tool_choice": "required"}, 400, "tool_choice: "),
        ({"max_tokens": 2, "max_completion_tokens": 3}, 400, "are both given"),
        ({"stream_options": {"more": True}}, 400, "stream_options.more: "),
        ({"n": 60}, 429, "60 texts are more than may wait (40)"),
        ({"top_logprobs": 2}, 400, "top_logprobs: needs logprobs: true"),
        ({"stop": ""}, 400, "stop: '' ends every text"),
        ({"messages": [{"role": "user", "content": [{"type": "file"}]}]}, 400, "'file' is not supported"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, 400, "is not UTF-8"),
        ({"response_format": {"type": "json_schema"}}, 400, "response_format"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "cat"}}}},
            400,
            "response_form",
        ),
    ],
)
def test_wrong_requests_are_one_error_in_openais_form(
    served: tuple[str, Server], body: dict[str, Any], status: int, text: str
) -> None:
    response = post(served, "/v1/chat/completions", {"messages": HELLO, **body})
    error = response.json()["error"]
    assert (response.status_code, set(error)) == (status, {"message", "type", "param", "code"}), error
    assert text in error["message"] and "\n" not in error["message"]


def test_errors_of_clients(served: tuple[str, Server]) -> None:
    wrong = openai.OpenAI(base_url=f"{served[0]}/v1", api_key="wrong", max_retries=0)
    with pytest.raises(openai.AuthenticationError):
        wrong.models.list()
    assert post(served, "/v1/other", {}).status_code == 404
    assert post(served, "/v1/chat/completions", b"{").status_code == 400
    assert post(served, "/v1/chat/completions", b"[" * 100_000).status_code == 400
    assert post(served, "/v1/chat/completions", b" " * 4_000_001).status_code == 413
    assert httpx.get(f"{served[0]}/v1/chat/completions", headers={"Authorization": f"Bearer {KEY}"}).status_code == 405


def test_a_full_queue_is_429_and_others_are_answered(client: openai.OpenAI) -> None:
    settings: dict[str, Any] = {"model": "tiny", "messages": HELLO, "temperature": 0}
    with pytest.raises(openai.RateLimitError) as caught:
        client.chat.completions.create(**settings, n=41)
    assert caught.value.response.headers["retry-after"] == "1"
    assert client.chat.completions.create(**settings).choices[0].message.content is not None


def test_concurrent_requests_equal_sequential_ones(client: openai.OpenAI) -> None:
    def ask(number: int) -> str:
        messages: Any = [{"role": "user", "content": "the dog " * (number % 7) + str(number)}]
        answer = client.chat.completions.create(model="tiny", messages=messages, seed=number, max_tokens=16)
        return answer.choices[0].message.content or ""

    sequential = [ask(number) for number in range(32)]
    with ThreadPoolExecutor(32) as pool:
        assert list(pool.map(ask, range(32))) == sequential
    assert len(set(sequential)) > 20


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_slot(served: tuple[str, Server], stream: bool) -> None:
    body = {"messages": HELLO, "max_tokens": 200, "stream": stream, "n": 8, "logit_bias": {"0": -100, "1": -100}}

    async def leave() -> None:
        headers = {"Authorization": f"Bearer {KEY}"}
        async with httpx.AsyncClient(timeout=30) as client:
            if not stream:
                with pytest.raises(asyncio.TimeoutError):
                    await asyncio.wait_for(
                        client.post(f"{served[0]}/v1/chat/completions", json=body, headers=headers), 0.1
                    )
                return
            async with client.stream(
                "POST", f"{served[0]}/v1/chat/completions", json=body, headers=headers
            ) as response:
                async for _ in response.aiter_lines():
                    break

    asyncio.run(leave())
    wait_until_idle(served[1])


def test_a_constraint_that_fails_ends_its_own_text_only(
    client: openai.OpenAI, served: tuple[str, Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_self: Any) -> Any:
        raise UserError("json_schema: too complex")

    monkeypatch.setattr(GrammarConstraint, "allowed", fail)
    with ThreadPoolExecutor(2) as pool:
        other = pool.submit(post, served, "/v1/completions", {"prompt": "the dog", "max_tokens": 200})
        with pytest.raises(openai.BadRequestError, match="too complex"):
            client.chat.completions.create(model="tiny", messages=HELLO, response_format={"type": "json_object"})
        assert other.result().status_code == 200
    wait_until_idle(served[1])


def mutate(generator: random.Random, value: Any) -> Any:
    """A body with one value replaced by another kind of value."""
    odd = [None, -1, 10**30, 1e308, "", "x" * 2000, [], {}, [[]], True, "\ud800", {"type": "json_object"}, [None], "\0"]
    if isinstance(value, dict) and value and generator.random() < 0.8:
        key = generator.choice(list(value))
        return {**value, key: mutate(generator, value[key])}
    if isinstance(value, list) and value and generator.random() < 0.8:
        index = generator.randrange(len(value))
        return [*value[:index], mutate(generator, value[index]), *value[index + 1 :]]
    return generator.choice(odd)


@pytest.mark.slow
def test_2000_malformed_requests_are_no_faults_of_the_server(served: tuple[str, Server]) -> None:
    generator = random.Random(1)
    chat = {
        "messages": [{"role": "user", "content": [{"type": "text", "text": "a"}], "name": "b"}], "max_tokens": 2,
        "stop": ["x"], "seed": 1, "n": 1, "temperature": 1.0, "top_p": 0.5, "stream": False, "tools": [{"a": 1}],
        "response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "integer"}}},
        "logit_bias": {"5": 1}, "logprobs": True, "top_logprobs": 1, "stream_options": {"include_usage": True},
    }  # fmt: skip
    completion = {"prompt": ["a", "b"], "max_tokens": 2, "echo": False, "logprobs": 1, "stop": "x", "min_p": 0.1}
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {"a": {}}}}}
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    calling = {
        "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [call]}], "tools": [tool],
        "tool_choice": {"type": "function", "function": {"name": "f"}}, "max_tokens": 4, "top_k": 0,
    }  # fmt: skip
    bodies = [("/v1/completions", completion), ("/v1/chat/completions", chat), ("/v1/chat/completions", calling)]
    statuses = []
    for number in range(2000):
        path, body = bodies[number % 3]
        content = json.dumps(mutate(generator, body)).encode()
        if number % 5 == 0:
            place = generator.randrange(len(content))
            content = content[:place] + bytes([generator.randrange(256)]) + content[place + 1 :]
        response = post(served, path, content)
        statuses.append(response.status_code)
        assert response.status_code < 500, (content, response.text)
    assert statuses.count(400) > 500 and statuses.count(200) > 50
    wait_until_idle(served[1])
    assert httpx.get(f"{served[0]}/health").status_code == 200


@pytest.mark.slow
def test_clients_that_leave_at_random_lose_no_answers_of_others(served: tuple[str, Server]) -> None:
    seconds = float(os.environ.get("LITGPT_TEST_SERVER_SECONDS", "20"))
    expected: dict[int, str] = {}
    counts, memory = Counter[str](), []

    async def ask(client: httpx.AsyncClient, number: int) -> str:
        body = {"messages": [{"role": "user", "content": f"the dog {number}"}], "seed": number, "max_tokens": 24}
        response = await client.post(f"{served[0]}/v1/chat/completions", json=body)
        assert response.status_code == 200, response.text
        return response.json()["choices"][0]["message"]["content"]

    async def run_client(client: httpx.AsyncClient, generator: random.Random, end: float) -> None:
        while time.monotonic() < end:
            number = generator.randrange(30)
            if generator.random() < 0.4:
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(ask(client, number), generator.random() * 0.2)
                counts["left"] += 1
            else:
                assert await ask(client, number) == expected[number]
                counts["answered"] += 1
            memory.append(read_resident_bytes())

    async def run_all() -> None:
        async with httpx.AsyncClient(timeout=60, headers={"Authorization": f"Bearer {KEY}"}) as client:
            expected.update({number: await ask(client, number) for number in range(30)})
            end = time.monotonic() + seconds
            await asyncio.gather(*(run_client(client, random.Random(seed), end) for seed in range(16)))

    asyncio.run(run_all())
    wait_until_idle(served[1])
    third = len(memory) // 3
    growth = max(memory[-third:]) / max(memory[:third]) - 1
    print(f"{dict(counts)}; memory of the last third over the first: {growth:+.1%}")
    assert counts["answered"] > 50 and counts["left"] > 50 and growth < 0.03


def read_resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.slow
def test_sigterm_finishes_what_is_running(served: tuple[str, Server]) -> None:
    command = [sys.executable, "-m", "litgpt", "serve", str(served[1].model.folder), "--port", "0", "--openai_spec"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stderr is not None
        lines = iter(process.stderr.readline, "")
        address = next(match.group(1) for line in lines if (match := re.search(r"at (http://\S+?);", line)))
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
        stream = client.chat.completions.create(
            model="tiny", messages=HELLO, max_tokens=200, stream=True, logit_bias={"0": -100, "1": -100}
        )
        pieces = iter(stream)
        next(pieces)
        process.send_signal(signal.SIGTERM)
        assert [choice.finish_reason for chunk in pieces for choice in chunk.choices][-1] == "length"
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.communicate()
