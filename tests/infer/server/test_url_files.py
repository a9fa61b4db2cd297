"""Media at URLs in OpenAI's API: fetched within limits if the server may, without holding up its other requests."""

import asyncio
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from litgpt.commands.serve import build_server
from litgpt.data.read import public_urls
from litgpt.data.read.public_urls import is_public
from litgpt.errors import UserError
from litgpt.infer.server.app import Server
from litgpt.infer.server.url_files import FetchLimits, UrlFiles
from litgpt.recipe.serve import Serve
from tests.data import url_server
from tests.infer.server.test_images import build_image, build_message
from tests.infer.server.test_server import CLIENT, HELLO
from tests.infer.server.test_videos_and_sounds import SETTINGS, build_url
from tests.infer.server.tiny_server import run_server, write_tiny_model
from tests.omni_model import write_media, write_omni_model

KINDS = {"image": ("a.png", "png"), "video": ("c.mp4", "mp4"), "audio": ("b.wav", "wav")}
LIMITS: dict[str, Any] = {"fetch_urls": True, "max_fetch_mb": 0.05, "fetch_seconds": 0.4, "max_fetches": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that reads all kinds of media, and one of each kind."""
    root = tmp_path_factory.mktemp("fetched")
    write_media(root)
    return write_omni_model(root / "omni")


@pytest.fixture(scope="module")
def files(folder: Path) -> Iterator[url_server.Server]:
    """Media at URLs, and answers that are slow or hostile."""
    with url_server.run_server(
        {f"/{name}": (folder.parent / name).read_bytes() for name, _ in KINDS.values()}
    ) as server:
        yield server


@pytest.fixture(scope="module")
def fetching(folder: Path) -> Iterator[tuple[str, Server]]:
    """A server to which that of the files counts as a public one, and other addresses of this machine do not."""
    recipe = Serve(checkpoint_dir=folder, **SETTINGS, **LIMITS)
    with pytest.MonkeyPatch.context() as patch, run_server(recipe) as started:
        patch.setattr(public_urls, "is_public", lambda address: address == "127.0.0.1")
        patch.setattr(public_urls, "WAITS", ())
        yield started


def post(address: str, *parts: dict[str, Any]) -> Any:
    return CLIENT.post(f"{address}/v1/chat/completions", json={"messages": build_message(*parts)})


def link(kind: str, url: str) -> dict[str, Any]:
    return {"type": f"{kind}_url", f"{kind}_url": {"url": url}}


def test_media_at_urls_are_those_of_data_urls(
    fetching: tuple[str, Server], files: url_server.Server, folder: Path
) -> None:
    linked = [link(kind, f"{files.url}/{name}") for kind, (name, _) in KINDS.items()]
    sent = [build_url(kind, (folder.parent / name).read_bytes(), form) for kind, (name, form) in KINDS.items()]
    files.asked.clear()
    answers = [post(fetching[0], *parts).json()["choices"] for parts in (sent, linked, [linked[0], *sent[1:]])]
    assert answers[0] == answers[1] == answers[2]
    assert post(fetching[0], *linked[:2]).json()["choices"] != answers[0]
    post(fetching[0], linked[0], linked[0])
    names = [f"/{name}" for name, _ in KINDS.values()]
    assert files.asked == [*names, names[0], *names[:2], names[0]]  # each once a request, and nothing is kept


FAULTS = [
    ("/missing", "URL with status 404; send the file itself, in a data URL"),
    ("/loop", "URL with too many redirects"),
    ("/private", "URL of no public address; send"),
    ("/local", "not a URL"),
    ("/large", "URL of too large a file: all files are more than max_fetch_mb: 0.05"),
    ("/endless", "URL of too large a file"),
    ("/body", "URL that takes too long: not all of it after fetch_seconds: 0.4"),
    ("/half", "URL that cannot be reached"),
    ("/a.bin", "image_url.url: image: not an image that can be read"),  # not of the type
]


@pytest.mark.parametrize(("path", "text"), FAULTS)
def test_faults_are_errors_of_the_request(
    path: str, text: str, fetching: tuple[str, Server], files: url_server.Server
) -> None:
    start = time.monotonic()
    response = post(fetching[0], build_image(files.url + path))
    message = response.json()["error"]["message"]
    assert (response.status_code, response.json()["error"]["param"]) == (400, "messages") and text in message
    assert "\n" not in message and len(message) < 300 and "127.0.0.2" not in message and time.monotonic() - start < 3


def test_limits_are_those_of_all_files_of_a_request(fetching: tuple[str, Server], files: url_server.Server) -> None:
    asked = len(files.asked)
    both = post(fetching[0], *[build_image(f"{files.url}/a.bin?{number}") for number in range(6)])
    assert "more than max_fetch_mb" in both.json()["error"]["message"] and len(files.asked) == asked + 5
    many = post(fetching[0], *[build_image(f"{files.url}/a.png?{number}") for number in range(17)])
    assert "17 images are more than max_images: 16" in many.json()["error"]["message"]
    assert len(files.asked) == asked + 5


def test_slow_files_hold_up_no_other_request(fetching: tuple[str, Server], files: url_server.Server) -> None:
    slow, answers = threading.Barrier(6), list[Any]()

    def ask() -> None:
        slow.wait()
        answers.append(post(fetching[0], build_image(f"{files.url}/body")))

    threads = [threading.Thread(target=ask) for _ in range(5)]
    for thread in threads:
        thread.start()
    slow.wait()
    time.sleep(0.1)
    start = time.monotonic()
    texts = [CLIENT.post(f"{fetching[0]}/v1/chat/completions", json={"messages": HELLO}) for _ in range(2)]
    assert [answer.status_code for answer in texts] == [200, 200] and time.monotonic() - start < 0.9
    assert not answers or len(answers) < 5  # 5 requests, two at a time, take three times fetch_seconds
    for thread in threads:
        thread.join()
    assert [answer.status_code for answer in answers] == [400] * 5
    assert post(fetching[0], build_image(f"{files.url}/a.png")).status_code == 200


def test_the_next_request_waits_for_a_thread_that_has_not_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    started, ended = threading.Event(), threading.Event()

    def receive(url: str, file: BinaryIO, *_args: Any, **_limits: Any) -> None:
        file.write(url.encode())
        if url == "first":
            started.set()
            ended.wait(20)

    async def fetch(url_files: UrlFiles, url: str) -> dict[str, bytes]:
        async with url_files.fetch([url]) as files:
            return files

    async def fetch_both() -> dict[str, bytes]:
        url_files = UrlFiles(FetchLimits(megabytes=1, seconds=5, requests=1, waiting=9))
        first = asyncio.create_task(fetch(url_files, "first"))
        await asyncio.to_thread(started.wait)
        first.cancel()
        second = asyncio.create_task(fetch(url_files, "second"))
        await asyncio.wait([first, second], timeout=0.2)
        assert first.cancelled() and not second.done() and url_files._waiting == 1
        ended.set()
        return await second

    monkeypatch.setattr("litgpt.infer.server.url_files.receive_file", receive)
    assert asyncio.run(fetch_both()) == {"second": b"second"}


def test_without_the_switch_the_key_is_named(
    folder: Path, files: url_server.Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(public_urls, "is_public", is_public)
    files.asked.clear()
    with run_server(Serve(checkpoint_dir=folder, **SETTINGS)) as (address, _):
        response = post(address, build_image(f"{files.url}/a.png"))
    assert response.status_code == 400 and "or start the server with fetch_urls: true" in response.text
    with run_server(Serve(checkpoint_dir=folder, fetch_urls=True, **SETTINGS)) as (address, _):
        response = post(address, build_image(f"{files.url}/a.png"))  # of this machine, which is never asked
    assert response.status_code == 400 and "URL of no public address" in response.text and not files.asked
    with pytest.raises(UserError, match="fetch_seconds: 3 has no effect with fetch_urls: false; set fetch_urls: true"):
        Serve(checkpoint_dir=folder, fetch_seconds=3)


def test_a_model_that_reads_no_media_fetches_nothing(tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "tiny")
    with pytest.raises(
        UserError, match=r"^fetch_urls: true has no effect on a model that reads no media; leave it out"
    ):
        build_server(Serve(checkpoint_dir=tmp_path / "tiny", fetch_urls=True))
