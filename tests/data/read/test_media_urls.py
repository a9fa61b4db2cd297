"""Files of URLs: fetched within limits, kept by their content, and from public addresses alone."""

import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from litgpt.data.read import public_urls
from litgpt.data.read.fields import BadRow
from litgpt.data.read.media import Medium
from litgpt.data.read.media_urls import MediaUrls, UrlFetcher, open_fetcher
from litgpt.data.read.public_urls import is_public
from litgpt.errors import UserError
from tests.data.url_server import CONTENT, Server, run_server


@pytest.fixture
def server() -> Iterator[Server]:
    with run_server() as server:
        yield server


@pytest.fixture
def allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server counts as a public one, and other addresses of this machine do not."""
    monkeypatch.setattr(public_urls, "is_public", lambda address: address == "127.0.0.1")
    monkeypatch.setattr(public_urls, "WAITS", (0.01, 0.01))


def fetch(server: Server, folder: Path, path: str, **limits: Any) -> Path:
    return UrlFetcher(folder / "media", MediaUrls(True, **limits)).fetch(server.url + path)


@pytest.mark.usefixtures("allowed")
def test_a_file_is_kept_once_for_its_content(server: Server, tmp_path: Path) -> None:
    path = fetch(server, tmp_path, "/a.png")
    assert path.read_bytes() == CONTENT and path.parent == tmp_path / "media"
    for other in ("/b.png?size=3", "/moved", "/busy", "/a.png"):
        assert fetch(server, tmp_path, other) == path
    assert server.asked == ["/a.png", "/b.png?size=3", "/moved", "/a.png", "/busy", "/busy"]  # the last was known
    assert sorted(each.name for each in path.parent.iterdir()) == sorted([path.name, "urls"])
    path.unlink()
    assert fetch(server, tmp_path, "/a.png").read_bytes() == CONTENT
    next((tmp_path / "media" / "urls").iterdir()).write_text("../../../etc/passwd")
    assert {fetch(server, tmp_path, each) for each in ("/a.png", "/b.png?size=3", "/moved", "/busy")} == {path}


@pytest.mark.usefixtures("allowed")
def test_a_file_in_chunks(server: Server, tmp_path: Path) -> None:
    assert fetch(server, tmp_path, "/chunks").read_bytes() == CONTENT


FAULTS: list[tuple[str, dict[str, Any], str]] = [
    ("/missing", {}, "URL with status 404"),
    ("/loop", {}, "URL with too many redirects"),
    ("/private", {}, "URL of no public address"),
    ("/local", {}, "not a URL"),
    ("/large", {}, "URL of too large a file"),
    ("/a.png", {"max_mb": 0.01}, "URL of too large a file"),
    ("/endless", {"max_mb": 1}, "URL of too large a file"),
    ("/half", {}, "URL that cannot be reached"),
    ("/line", {}, "URL that cannot be reached"),
    ("/nonsense", {}, "URL that cannot be reached"),
    ("/header", {"seconds": 0.3}, "URL that takes too long"),
    ("/body", {"seconds": 0.3}, "URL that takes too long"),
]


@pytest.mark.usefixtures("allowed")
@pytest.mark.parametrize(("path", "limits", "reason"), FAULTS)
def test_faults_have_a_reason(path: str, limits: dict[str, Any], reason: str, server: Server, tmp_path: Path) -> None:
    fetcher, start = UrlFetcher(tmp_path / "media", MediaUrls(True, **limits)), time.monotonic()
    with pytest.raises(BadRow) as raised:
        fetcher.fetch(server.url + path)
    assert raised.value.reason == reason and time.monotonic() - start < 3
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 300
    assert not any((tmp_path / "media").iterdir())
    asked = len(server.asked)
    with pytest.raises(BadRow):
        fetcher.fetch(server.url + path)
    assert len(server.asked) == asked  # it is not tried again


PRIVATE = ["127.0.0.1", "localhost", "127.1", "0x7f000001", "2130706433", "0.0.0.0", "[::1]", "[::ffff:127.0.0.1]"]


@pytest.mark.parametrize("host", [*PRIVATE, "user@127.0.0.1"])
def test_this_machine_is_never_asked(host: str, server: Server, tmp_path: Path) -> None:
    with pytest.raises(BadRow) as raised:
        UrlFetcher(tmp_path / "media", MediaUrls(True)).fetch(f"http://{host}:{server.server_port}/a.png")
    assert raised.value.reason == "URL of no public address" and not server.asked


def test_a_name_of_public_and_private_addresses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (each, 80)) for each in ("93.184.215.14", "10.0.0.7")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_args, **_options: answers)
    with pytest.raises(BadRow, match=r"URL of no public address \(http://example.com/a: 10\.0\.0\.7\)"):
        UrlFetcher(tmp_path / "media", MediaUrls(True)).fetch("http://example.com/a")


def test_a_name_that_is_not_known_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, known = list[str](), threading.Event()

    def look_up(host: str, *_args: Any, **_options: Any) -> Any:
        asked.append(host)
        known.wait(20)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("10.0.0.7", 80))]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    monkeypatch.setattr(public_urls, "LOOKUPS", threading.BoundedSemaphore(1))
    for number in range(2):  # of which the second one finds the only thread busy
        start = time.monotonic()
        with pytest.raises(BadRow) as raised:
            UrlFetcher(tmp_path / f"media {number}", MediaUrls(True, seconds=0.3)).fetch("http://example.com/a")
        assert raised.value.reason == "URL that takes too long" and time.monotonic() - start < 3
    assert asked == ["example.com"]
    known.set()
    with pytest.raises(BadRow, match=r"10\.0\.0\.7"):
        UrlFetcher(tmp_path / "media", MediaUrls(True)).fetch("http://example.com/a")


@pytest.mark.parametrize(
    ("address", "public"),
    [
        *((address, True) for address in ("93.184.215.14", "2606:2800:21f::1", "64:ff9b::5db8:d70e", "::ffff:8.8.8.8")),
        *((address, False) for address in ("10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1")),
        *((address, False) for address in ("0.0.0.0", "224.0.1.1", "255.255.255.255", "192.0.2.1", "240.0.0.1")),
        *(
            (address, False)
            for address in ("::", "::1", "fe80::1%eth0", "fc00::1", "fec0::1", "ff02::1", "2001:db8::1")
        ),
        *((address, False) for address in ("64:ff9b::a9fe:a9fe", "64:ff9b:1::1", "2002:7f00:1::1", "::ffff:10.0.0.1")),
        ("2001:0:4136:e378:8000:63bf:80ff:fffe", False),  # Teredo, of 127.0.0.1
    ],
)
def test_public_addresses(address: str, public: bool) -> None:
    assert is_public(address) == public


@pytest.mark.parametrize("url", ["ftp://example.com/a", "http://", "http://[::1", "http://a:99999/", "javascript:1"])
def test_what_is_no_url(url: str, tmp_path: Path) -> None:
    with pytest.raises(BadRow) as raised:
        UrlFetcher(tmp_path / "media", MediaUrls(True)).fetch(url)
    assert raised.value.reason == "not a URL"


def test_many_threads_fetch_a_file_once(server: Server, tmp_path: Path, allowed: None) -> None:  # noqa: ARG001
    fetcher, found = UrlFetcher(tmp_path / "media", MediaUrls(True)), list[Path]()
    threads = [threading.Thread(target=lambda: found.append(fetcher.fetch(f"{server.url}/a.png"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8 and len(set(found)) == 1 and server.asked == ["/a.png"]


def test_without_the_switch_the_key_is_named() -> None:
    with pytest.raises(BadRow, match=r"http://x/a; set data\.media_urls\.enabled: true, or download it"):
        open_fetcher(Path("media"), MediaUrls())(Medium(url="http://x/a"))
    with pytest.raises(UserError, match=r"data\.media_urls\.max_mb: 3 has no effect with .*enabled: false"):
        MediaUrls(max_mb=3)
