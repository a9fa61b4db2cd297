"""The chat page: its files over HTTP, and its behavior in a browser."""

import asyncio
import copy
import json
import re
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import httpx
import openai
import pytest

from litgpt.infer.engine import Engine
from litgpt.infer.server import chat_page
from litgpt.infer.server.app import Server, build_app
from litgpt.infer.server.responses import ResponseWriter
from tests.infer.server.chromium import CONTROL, PROGRAM, SHIFT, Chromium, start_chromium
from tests.infer.server.tiny_server import KEY, wait_until_idle

IDLE = "document.getElementById('stop').hidden"
ANSWERED = f"{IDLE} && document.querySelector('article.assistant:last-child .note')?.textContent"
TEXT = "document.querySelector('article:last-child .text').innerText"
PROBLEM = "document.querySelector('#problem:not([hidden]) span')?.textContent"


def test_files_need_no_key_and_allow_only_the_server(served: tuple[str, Server]) -> None:
    client = httpx.Client(base_url=served[0])
    for path, file in chat_page.FILES.items():
        response = client.get(path)
        assert response.status_code == 200 and response.content == file.read_bytes()
        policy = response.headers["content-security-policy"].split("; ")
        assert policy[:2] == ["default-src 'none'", "script-src 'self'"] and "unsafe" not in str(policy)
        named = response.text.replace("http://www.w3.org/2000/svg", "")
        assert re.findall(r"https?://\w+", named) == []
    page = client.get("/").text
    linked = set(re.findall(r'(?:src|href)="([^"]+)"', page))
    modules = re.findall(r'from "\./([^"]+)"', "".join(file.read_text() for file in chat_page.FILES.values()))
    assert {f"/{path}" for path in linked} | {f"/page/{name}" for name in modules} == set(chat_page.FILES) - {"/"}
    assert client.get("/page/other.js").status_code == 401
    for method, path in (("POST", "/"), ("DELETE", "/page/chat.js"), ("GET", "/v1/models"), ("GET", "/metrics")):
        assert client.request(method, path, headers={"content-length": "0"}).status_code == 401


def test_the_route_of_litgpt_may_have_the_path_of_the_page(served: tuple[str, Server]) -> None:
    server = served[1]
    app = build_app(Server([server.model], server.thread, replace(server.settings, predict_path="/")))

    async def ask_both() -> tuple[httpx.Response, ...]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server") as client:
            key = {"Authorization": f"Bearer {KEY}"}
            page, refused = await client.get("/"), await client.post("/", json={"prompt": "the dog"})
            return page, refused, await client.post("/", json={"prompt": "the dog"}, headers=key)

    page, refused, answered = asyncio.run(ask_both())
    assert page.headers["content-type"].startswith("text/html")
    assert refused.status_code == 401 and set(answered.json()) == {"output"}


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    if PROGRAM is None:
        pytest.skip("needs Chromium")
    with start_chromium(tmp_path_factory.mktemp("profile")) as started:
        yield started


@pytest.fixture
def page(browser: Chromium, served: tuple[str, Server]) -> Iterator[Chromium]:
    """The chat page with empty storage but for the key, which is checked not to use another host or break a policy."""
    browser.set_size(1200, 800)
    browser.open(served[0])
    browser.evaluate(f"localStorage.clear(); sessionStorage.clear(); sessionStorage.setItem('litgpt.key', '{KEY}')")
    browser.open(served[0])
    browser.wait("document.getElementById('model-line').textContent === 'tiny, 256 tokens of context'")
    browser.events.clear()
    yield browser
    assert {request["url"] for request in browser.list_requests() if not request["url"].startswith(served[0])} == set()
    faults = [event["params"] for event in browser.events if event["method"] == "Runtime.exceptionThrown"]
    assert faults == []


def set_fields(page: Chromium, **values: str) -> None:
    """Fill in the fields of the settings."""
    page.click("#open-settings")
    for name, value in values.items():
        page.evaluate(f"document.querySelector('[name={name}]').select()")
        page.type(value)
    page.click("#settings .primary")
    page.wait("!document.getElementById('settings').open")


def ask(page: Chromium, text: str) -> None:
    page.evaluate("document.getElementById('input').focus()")
    page.type(text)
    page.press("Enter")


def read_bodies(page: Chromium) -> list[dict[str, Any]]:
    """The bodies of the requests for answers."""
    return [
        json.loads(request["postData"])
        for request in page.list_requests()
        if request["url"].endswith("/v1/chat/completions")
    ]


def write_texts(monkeypatch: pytest.MonkeyPatch, pieces: list[str]) -> None:
    """Let the next answers have these pieces of text."""
    real, rest = ResponseWriter.write_piece, iter(pieces)

    def write_piece(writer: ResponseWriter, index: int, answer: Any, _text: str, tokens: Any) -> dict[str, Any]:
        return real(writer, index, answer, next(rest, ""), tokens)

    monkeypatch.setattr(ResponseWriter, "write_piece", write_piece)


@pytest.mark.slow
def test_an_answer_is_streamed_with_the_settings_and_survives_a_reload(
    page: Chromium, served: tuple[str, Server]
) -> None:
    settings = {"temperature": 0.7, "top_p": 0.9, "max_tokens": 30, "seed": 5}
    set_fields(page, system="be kind", **{name: str(value) for name, value in settings.items()})
    page.evaluate("""window.lengths = new Set();
        new MutationObserver(() => lengths.add(document.querySelector('.assistant .text')?.textContent.length))
            .observe(document.getElementById('log'), {subtree: true, childList: true})""")
    ask(page, "the dog")
    note = page.wait(ANSWERED)
    assert re.fullmatch(r"\d+ tokens, \d+\.\d tokens/s(, maximum reached)?", note)
    assert page.evaluate("lengths.size") > 3
    messages: list[Any] = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "the dog"}]
    [body] = read_bodies(page)
    assert body == {
        "model": "tiny", "messages": messages, **settings, "stream": True, "stream_options": {"include_usage": True}
    }  # fmt: skip
    client = openai.OpenAI(base_url=f"{served[0]}/v1", api_key=KEY)
    answer = (
        client.chat.completions.create(model="tiny", messages=messages, **settings).choices[0].message.content or ""
    )
    stored = "JSON.parse(Object.entries(localStorage).find(([name]) => name.startsWith('litgpt.conversation.'))[1])"
    assert page.evaluate(f"{stored}.messages[1].content") == answer
    shown = page.evaluate(TEXT)
    page.click("#rename")
    page.type("About dogs")
    page.press("Enter")
    page.open(served[0])
    assert page.wait("document.querySelector('#conversations [aria-current]')?.textContent") == "About dogs"
    assert page.evaluate(TEXT) == shown and page.evaluate("document.getElementById('title').innerText") == "About dogs"
    page.wait("document.getElementById('model-line').textContent")
    ask(page, "and the fox")
    page.wait(f"{ANSWERED} && document.querySelectorAll('article').length === 4")
    assert [message["content"] for message in read_bodies(page)[-1]["messages"]] == [
        "be kind", "the dog", answer, "and the fox"
    ]  # fmt: skip
    page.click("article:last-child .again")
    page.wait(f"{ANSWERED} && document.querySelectorAll('article').length === 4")
    assert read_bodies(page)[-1] == read_bodies(page)[-2]


@pytest.mark.slow
@pytest.mark.parametrize("way", ["button", "Escape", "reload"])
def test_stopping_an_answer_frees_its_slot(
    page: Chromium, served: tuple[str, Server], monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    real, steps = Engine.step, []

    def step(engine: Engine) -> Any:
        steps.append(time.sleep(0.05))
        return real(engine)

    monkeypatch.setattr(Engine, "step", step)
    write_texts(monkeypatch, [f"word{number} " for number in range(300)])
    set_fields(page, max_tokens="200", seed="1")
    ask(page, "the dog")
    page.wait(f"{TEXT}.includes('word3')")
    if way == "button":
        page.click("#stop")
    elif way == "Escape":
        page.press("Escape")
    else:
        page.open(served[0])
    page.wait(IDLE)
    wait_until_idle(served[1])
    assert len(steps) < 60  # of 200
    assert "word3" in page.evaluate(TEXT)
    if way != "reload":
        assert page.evaluate("document.querySelector('article:last-child .note').textContent") == "stopped"


def test_markdown_is_shown_and_markup_of_an_answer_is_not_run(page: Chromium, monkeypatch: pytest.MonkeyPatch) -> None:
    attack = "<script>window.ran = 1</script><img src=x onerror='window.ran = 2'>"
    links = "[bad](javascript:window.ran=3) [good](https://example.org/a) https://example.org/b."
    lines = [
        f"# Title {attack}", f"Some **bold {attack}**, *slanted*, `code {attack}`", links, "", "- one", "  - two",
        "", "1. first", "2. second", "", "> quoted", "", "| a | b |", "|---|---|", f"| 1 | {attack} |", "", "---", "",
        "```html", attack, "  indented", "```", "> " * 2000 + "deep", "```", "open",
    ]  # fmt: skip
    write_texts(monkeypatch, [f"{line}\n" for line in lines])
    set_fields(page, max_tokens="100", seed="2")
    ask(page, "the dog")
    page.wait(ANSWERED)
    shape = page.evaluate("""[...document.querySelector('.assistant .text').children].map((element) =>
        element.tagName + '.' + element.className)""")
    assert shape == [
        "H2.",
        "P.",
        "UL.",
        "OL.",
        "BLOCKQUOTE.",
        "DIV.table",
        "HR.",
        "DIV.code",
        "BLOCKQUOTE.",
        "DIV.code",
    ]
    counts = {"script, img": 0, "strong": 1, "em": 1, "p code": 1, "li li": 1, "ol > li": 2, "tbody td": 2, "a": 2}
    for selector, count in counts.items():
        assert page.evaluate(f"document.querySelectorAll('.assistant .text :is({selector})').length") == count, selector
    assert page.evaluate("[...document.querySelectorAll('.text a')].map((link) => link.href)") == [
        "https://example.org/a", "https://example.org/b"
    ]  # fmt: skip
    assert page.evaluate("document.querySelector('.code code').textContent") == f"{attack}\n  indented"
    assert page.evaluate("window.ran") is None
    page.evaluate("navigator.clipboard.writeText = (text) => { window.copied = text; return Promise.resolve(); }")
    page.click(".code .copy")
    assert page.wait("window.copied") == f"{attack}\n  indented"
    blocked = "fetch('https://example.org/').then(() => 'sent', () => 'blocked')"
    assert page.evaluate(blocked) == "blocked"
    inline = "document.body.append(Object.assign(document.createElement('script'), {textContent: 'window.ran = 4'}))"
    assert page.evaluate(f"{inline}; window.ran") is None
    page.events.clear()  # the request to another host that was blocked


@pytest.mark.slow
def test_nothing_is_wider_than_a_phone(page: Chromium, monkeypatch: pytest.MonkeyPatch) -> None:
    table = "|" + "a long cell |" * 20
    lines = ["w" * 300, "", f"`{'c' * 300}`", "", "```", "x" * 300, "```", table, "|" + "---|" * 20, table]
    write_texts(monkeypatch, [f"{line}\n" for line in lines])
    page.set_size(390, 844)
    ask(page, "u" * 100)
    page.wait(ANSWERED)
    width = """Math.max(document.documentElement.scrollWidth, document.getElementById('scroll').scrollWidth,
        ...[...document.querySelectorAll('body *')].map((element) => element.closest('pre, .table, aside') ? 0 :
        element.getBoundingClientRect().right))"""
    assert page.evaluate(width) <= 390
    page.click("#menu")
    page.wait("document.getElementById('sidebar').getBoundingClientRect().x === 0")
    assert page.evaluate("document.activeElement.id") == "new"
    page.press("Escape")
    page.wait("document.getElementById('sidebar').inert && document.activeElement.id === 'menu'")
    page.click("#open-settings")
    assert page.evaluate(width) <= 390
    page.press("Escape")


@pytest.mark.slow
def test_keys_and_conversations(page: Chromium) -> None:
    page.type("one")
    page.press("Enter", SHIFT)
    page.type("two")
    assert page.evaluate("document.getElementById('input').value") == "one\ntwo"
    page.press("Enter")
    page.wait(ANSWERED)
    assert read_bodies(page)[0]["messages"][0]["content"] == "one\ntwo"
    for key, modifiers in (("/", 0), ("k", CONTROL)):
        page.evaluate("document.getElementById('input').blur()")
        page.press(key, modifiers)
        assert page.evaluate("document.activeElement.id + document.getElementById('input').value") == "input"
    page.press("Tab")
    assert page.evaluate("document.activeElement.matches('#send:focus-visible')")
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.click("#new")
    ask(page, "second")
    page.wait(ANSWERED)
    titles = "[...document.querySelectorAll('#conversations li')].map((item) => item.textContent)"
    assert page.evaluate(titles) == ["second", "one two"]
    page.click("#delete")
    assert page.evaluate(titles) == ["one two"]
    page.click("#undo")
    assert page.evaluate(titles) == ["second", "one two"]
    page.click("#delete")
    page.click("#conversations li:first-child button")
    assert page.evaluate("document.querySelector('article .text').textContent") == "one\ntwo"


@pytest.mark.slow
def test_errors_are_one_line(page: Chromium, served: tuple[str, Server], monkeypatch: pytest.MonkeyPatch) -> None:
    set_fields(page, key="wrong", max_tokens="20")
    assert page.wait(PROBLEM) == "The API key is missing or wrong."
    page.click("#enter-key")
    page.wait("document.activeElement.name === 'key'")
    page.evaluate("document.activeElement.select()")
    page.type(KEY)
    page.press("Enter")
    page.wait("document.getElementById('problem').hidden")
    assert page.evaluate("JSON.stringify(localStorage)").count(KEY) == 0
    with monkeypatch.context() as patch:
        patch.setattr(served[1].thread, "max_waiting", 1)
        patch.setattr(type(served[1].thread), "waiting", 1)
        ask(page, "the dog")
        assert page.wait(PROBLEM) == "1 requests wait already; try again later"
    page.click("#retry")
    page.wait(ANSWERED)
    ask(page, "the fox " * 300)
    assert "exceed the model's context of 256" in page.wait(PROBLEM)
    page.click("#edit")
    page.evaluate("document.getElementById('input').select()")
    ask(page, "the fox")
    page.wait(f"{ANSWERED} && document.querySelectorAll('article').length === 4")
    assert [message["content"] for message in read_bodies(page)[-1]["messages"]][::2] == ["the dog", "the fox"]
    page.click("#new")
    page.call("Network.emulateNetworkConditions", offline=True, latency=0, downloadThroughput=0, uploadThroughput=0)
    ask(page, "the cat")
    assert page.wait(PROBLEM) == "The server does not answer."
    page.call("Network.emulateNetworkConditions", offline=False, latency=0, downloadThroughput=-1, uploadThroughput=-1)
    page.click("#retry")
    page.wait(ANSWERED)
    assert page.evaluate("document.querySelectorAll('article').length") == 2


@pytest.mark.slow
def test_the_chosen_model_answers(page: Chromium, served: tuple[str, Server], monkeypatch: pytest.MonkeyPatch) -> None:
    other = copy.copy(served[1].model)
    other.name = "other"
    monkeypatch.setitem(served[1].models, "other", other)
    page.open(served[0])
    page.wait("document.getElementById('model-line').textContent")
    page.click("#open-settings")
    options = "[...document.querySelectorAll('[name=model] option')].map((option) => option.value)"
    assert page.evaluate(options) == ["tiny", "other"]
    page.evaluate("""const field = document.querySelector('[name=model]'); field.value = 'other';
        field.dispatchEvent(new Event('input', {bubbles: true}))""")
    page.press("Escape")
    page.wait("document.getElementById('model-line').textContent.startsWith('other')")
    ask(page, "the dog")
    page.wait(ANSWERED)
    assert read_bodies(page)[-1]["model"] == "other"


@pytest.mark.slow
def test_storage_of_other_tabs_damaged_and_full(page: Chromium, served: tuple[str, Server]) -> None:
    entry = {"id": "x", "title": "of a tab", "updated": 1, "messages": [{"role": "user", "content": "hello"}]}
    page.evaluate(f"""localStorage.setItem('litgpt.conversation.x', JSON.stringify({json.dumps(entry)}));
        localStorage.setItem('litgpt.conversation.y', '{{"id": ');
        dispatchEvent(new StorageEvent('storage', {{key: 'litgpt.conversation.x'}}))""")
    titles = "[...document.querySelectorAll('#conversations li')].map((item) => item.textContent)"
    assert page.evaluate(titles) == ["of a tab"]
    page.evaluate("Storage.prototype.setItem = () => { throw new DOMException('', 'QuotaExceededError'); }")
    ask(page, "the dog")
    page.wait(ANSWERED)
    assert "did not store the conversation" in page.evaluate("document.getElementById('notice').textContent")
    assert page.evaluate(titles) == ["the dog", "of a tab"]
    page.open(served[0])
    assert page.wait("document.querySelectorAll('#conversations li').length === 1")
    page.click("#conversations button")
    assert page.evaluate("document.querySelector('article .text').textContent") == "hello"
    assert page.wait(PROBLEM) == "This message has no answer."
    page.click("#retry")
    page.wait(ANSWERED)
