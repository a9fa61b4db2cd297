"""Fetch the files of URLs in rows: from public addresses alone, within limits, into a cache by content."""

import hashlib
import re
import socket
import ssl
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from http.client import HTTPException
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import urljoin

from annotated_types import Ge, Le

from litgpt.data.read.conversation import Conversation
from litgpt.data.read.fields import BadRow
from litgpt.data.read.media import Medium, refuse_url
from litgpt.data.read.message import Message
from litgpt.data.read.row_media import resolve_media
from litgpt.errors import UserError
from litgpt.files import sync_file, write_text
from litgpt.recipe.bounds import check_numbers
from litgpt.recipe.effect import check_effects
from litgpt.version import __version__

if TYPE_CHECKING:
    from urllib3 import HTTPResponse

PORTS = {"http": 80, "https": 443}
REDIRECT_STATUSES, MAX_REDIRECTS = (301, 302, 303, 307, 308), 5
BUSY_STATUSES = (429, 500, 502, 503, 504)
WAITS = (0.5, 2.0)  # seconds before another attempt
SILENCE_SECONDS = 10.0  # after which an attempt is given up
FETCH_BYTES = 1 << 16
GLOBAL_UNICAST, TRANSLATED = IPv6Network("2000::/3"), IPv6Network("64:ff9b::/96")
"""The IPv6 addresses of hosts (RFC 4291), and those that are IPv4 addresses (RFC 6052)."""
UNREACHABLE, TOO_SLOW, TOO_LARGE = "URL that cannot be reached", "URL that takes too long", "URL of too large a file"
NOT_PUBLIC, NOT_A_URL, TOO_MANY = "URL of no public address", "not a URL", "URL with too many redirects"


@dataclass(frozen=True)
class MediaUrls:
    """Media at http and https URLs, whose files are kept beside the samples."""

    enabled: bool = False
    """Fetch them when rows are prepared; only from public addresses, and not through a proxy."""
    max_mb: Annotated[float, Ge(0.001), Le(1e5)] = 20.0
    """Largest file, in MB."""
    seconds: Annotated[float, Ge(0.01), Le(86400)] = 30.0
    """Most time for a file, with its redirects and three attempts."""
    connections: Annotated[int, Ge(1), Le(256)] = 16
    """Number of files that are fetched at a time; the order of rows does not depend on it."""

    def __post_init__(self) -> None:
        check_numbers(self, "data.media_urls.")
        other, cure = "data.media_urls.enabled: false", "set data.media_urls.enabled: true"
        names = ("max_mb", "seconds", "connections")
        check_effects(self, "data.media_urls.", *names, have_effect=self.enabled, other=other, cure=cure)

    def fingerprint_parts(self) -> list[Any]:
        """What decides which files are fetched, as JSON values; nothing if none are."""
        return ["media_urls", self.max_mb, self.seconds] if self.enabled else []


def open_fetcher(folder: Path, limits: MediaUrls) -> Callable[[Medium], Path]:
    """What finds the files of media at URLs, in a folder, or refuses them all."""
    if not limits.enabled:
        return partial(refuse_url, cure="set data.media_urls.enabled: true, or download it, and give its path")
    fetcher = UrlFetcher(folder, limits)
    return lambda medium: fetcher.fetch(medium.name)


def build_resolver(
    folder: Path, downloads: Path, urls: MediaUrls, split: Callable[[Message], Message] | None = None
) -> Callable[[Conversation], Conversation]:
    """What finds the files of the media of conversations, or raises a BadRow.

    Args:
        folder: that paths are relative to and may not leave.
        downloads: in whose folder `media` the files of URLs are kept.
        split: puts the pieces of long sounds in their place; None to leave them as they are.
    """
    fetch = open_fetcher(downloads.absolute() / "media", urls)

    def resolve(conversation: Conversation) -> Conversation:
        if not conversation.media:
            return conversation
        messages = resolve_media(conversation.messages, folder, fetch)
        return replace(conversation, messages=messages if split is None else tuple(map(split, messages)))

    return resolve


class UnansweredError(Exception):
    """An attempt to fetch a file that another one may do better than."""


class UrlFetcher:
    """Fetches files, of which it keeps one for each content; several threads may call it.

    Args:
        folder: of the files by their SHA-256, and of that of each URL.
    """

    def __init__(self, folder: Path, limits: MediaUrls) -> None:
        self.folder, self.limits = folder, limits
        self._fetched: dict[str, Future[Path]] = {}  # those in progress, and those that failed
        self._lock = threading.Lock()

    def fetch(self, url: str) -> Path:
        """The file of a URL, which is fetched if it was not before.

        Raises:
            BadRow: if that is impossible, which is not tried again in this run.
        """
        with self._lock:
            known = self._fetched.get(url)
            fetched = self._fetched.setdefault(url, Future())
        if known is not None:
            return known.result()
        try:
            fetched.set_result(self._find(url) or self._download(url))
            del self._fetched[url]
        except BaseException as error:
            fetched.set_exception(error)
            if not isinstance(error, BadRow):
                raise
        return fetched.result()

    def _find(self, url: str) -> Path | None:
        index = self._index(url)
        name = index.read_text("latin-1") if index.is_file() else ""
        return path if re.fullmatch("[0-9a-f]{64}", name) and (path := self.folder / name).is_file() else None

    def _index(self, url: str) -> Path:
        return self.folder / "urls" / hashlib.sha256(url.encode(errors="replace")).hexdigest()

    def _download(self, url: str) -> Path:
        target = self.folder / f"{uuid.uuid4().hex}.partial"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with Deadline(self.limits.seconds) as deadline:
                name = self._try_download(url, target, deadline)
            sync_file(target)
            write_text(self._index(url), name)
            return target.replace(self.folder / name)
        except OSError as error:  # those of connections are bad rows
            raise UserError(
                f"{self.folder}: cannot be written ({error}); set data.cache_dir to another folder"
            ) from None
        finally:
            target.unlink(missing_ok=True)

    def _try_download(self, url: str, target: Path, deadline: "Deadline") -> str:
        for wait in (*WAITS, None):
            try:
                return self._receive(url, target, deadline)
            except UnansweredError as error:
                if deadline.is_over:
                    raise BadRow(TOO_SLOW, f"{url[:80]}: not all of it after {self.limits.seconds:g} s") from None
                if wait is None or deadline.left < wait:
                    raise BadRow(UNREACHABLE, f"{url[:80]}: {' '.join(str(error).split())[:100]}") from None
                time.sleep(wait)
        raise AssertionError("the last attempt ends the loop")

    def _receive(self, url: str, target: Path, deadline: "Deadline") -> str:
        """Write the file of a URL; returns its SHA-256 in hexadecimal."""
        for _ in range(MAX_REDIRECTS + 1):
            with open_response(url, deadline) as response:
                location = response.headers.get("Location")
                if response.status in REDIRECT_STATUSES and location:
                    url = urljoin(url, location)
                elif response.status in BUSY_STATUSES:
                    raise UnansweredError(f"status {response.status}")
                elif response.status != 200:
                    raise BadRow(f"URL with status {response.status}", url[:80])
                else:
                    return self._store(url, response, target)
        raise BadRow(TOO_MANY, f"{url[:80]}: more than {MAX_REDIRECTS}")

    def _store(self, url: str, response: "HTTPResponse", target: Path) -> str:
        limit, size, digest = int(self.limits.max_mb * 1e6), 0, hashlib.sha256()
        too_large = BadRow(TOO_LARGE, f"{url[:80]}: more than data.media_urls.max_mb: {self.limits.max_mb:g}")
        if int(response.headers.get("Content-Length", 0)) > limit:
            raise too_large
        with target.open("wb") as file:
            for block in response.stream(FETCH_BYTES, decode_content=False):
                size += len(block)
                if size > limit:
                    raise too_large
                digest.update(block)
                file.write(block)
        return digest.hexdigest()


class Deadline:
    """Ends connections when their time is over, also those whose other side sends a byte now and then."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds
        self._sockets: list[socket.socket] = []
        self._timer = threading.Timer(seconds, self._end_connections)
        self._timer.daemon = True

    def __enter__(self) -> "Deadline":
        self._timer.start()
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self._timer.cancel()
        self._timer.join()
        for each in self._sockets:
            each.close()

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return self._end - time.monotonic()

    @property
    def is_over(self) -> bool:
        """Whether none are left."""
        return self.left <= 0

    def guard(self, connection: socket.socket) -> None:
        """End this connection at the end; raises a TimeoutError if that was before."""
        self._sockets.append(connection.dup())  # of its own, since TLS takes the connection over
        if self.is_over:
            raise TimeoutError("no time left")

    def _end_connections(self) -> None:
        for each in list(self._sockets):
            try:
                each.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue  # the other side has ended it


@contextmanager
def open_response(url: str, deadline: Deadline) -> Iterator["HTTPResponse"]:
    """Send a request for a URL, and close the connection after the block.

    Raises:
        BadRow: if it is not an http or https URL, or not of a public address.
        UnansweredError: here and in the block, if the other side does not answer as it should, or not in time.
    """
    from urllib3.connection import HTTPConnection
    from urllib3.exceptions import HTTPError
    from urllib3.util import parse_url

    try:
        parsed = parse_url(url)
    except (HTTPError, ValueError):
        raise BadRow(NOT_A_URL, url[:80]) from None
    host, scheme = (parsed.host or "").strip("[]"), parsed.scheme or ""
    if scheme not in PORTS or not host:
        raise BadRow(NOT_A_URL, f"{url[:80]}; use one of http or https")
    connection = HTTPConnection(host, parsed.port or PORTS[scheme], timeout=SILENCE_SECONDS)
    headers = {"Host": parsed.netloc or host, "User-Agent": f"litgpt/{__version__}", "Accept-Encoding": "identity"}
    try:
        opened = connect_publicly(url, host, connection.port, deadline)
        connection.sock = opened if scheme == "http" else load_trust().wrap_socket(opened, server_hostname=host)
        connection.request("GET", parsed.request_uri, headers=headers, preload_content=False, decode_content=False)
        response = connection.getresponse()
    except (HTTPError, HTTPException, OSError, ValueError) as error:
        connection.close()
        raise UnansweredError(str(error) or type(error).__name__) from None
    except BaseException:
        connection.close()
        raise
    try:
        yield response
    except (HTTPError, HTTPException, ValueError) as error:
        raise UnansweredError(str(error) or type(error).__name__) from None
    finally:
        connection.close()
    if deadline.is_over:  # a connection that was ended looks like one that has ended
        raise UnansweredError("no time left")


def connect_publicly(url: str, host: str, port: int, deadline: Deadline) -> socket.socket:
    """Connect to one of the addresses that a name has now, all of which must be public.

    Raises:
        BadRow: if one is not.
        OSError: if there are none, or none answers.
    """
    addresses = list_addresses(host, port)
    for address in addresses:
        if not is_public(address):
            raise BadRow(NOT_PUBLIC, f"{url[:80]}: {address}")
    fault = OSError("no address")
    for address in addresses:
        try:
            opened = socket.create_connection((address, port), max(0.001, min(SILENCE_SECONDS, deadline.left)))
        except OSError as error:
            fault = error
            continue
        deadline.guard(opened)
        return opened
    raise fault


def list_addresses(host: str, port: int) -> list[str]:
    """The addresses of a name; raises an OSError if it has none."""
    entries = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(address[0]) for *_, address in entries))


def is_public(address: str) -> bool:
    """Whether an address is one of a host in the internet: not of this machine, a local network or a group of hosts.

    An IPv4 address that an IPv6 address has in it is what counts.
    """
    parsed: IPv4Address | IPv6Address = ip_address(address)
    if isinstance(parsed, IPv6Address):
        inner = parsed.ipv4_mapped or parsed.sixtofour or (parsed.teredo or (None, None))[1]
        inner = inner or (IPv4Address(int(parsed) & 0xFFFFFFFF) if parsed in TRANSLATED else None)
        if inner is None and parsed not in GLOBAL_UNICAST:
            return False
        parsed = inner or parsed
    return parsed.is_global and not parsed.is_multicast


@cache
def load_trust() -> ssl.SSLContext:
    """The certificates of this machine."""
    return ssl.create_default_context()
