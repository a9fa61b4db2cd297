"""Receive the files of URLs: from public addresses alone, within limits of size and time."""

import hashlib
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from http.client import HTTPException
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import TYPE_CHECKING, BinaryIO
from urllib.parse import urljoin

from litgpt.data.read.fields import BadRow
from litgpt.version import __version__

if TYPE_CHECKING:
    from urllib3 import HTTPResponse

PORTS = {"http": 80, "https": 443}
REDIRECT_STATUSES, MAX_REDIRECTS = (301, 302, 303, 307, 308), 5
BUSY_STATUSES = (429, 500, 502, 503, 504)
WAITS = (0.5, 2.0)  # seconds before another attempt
SILENCE_SECONDS = 10.0  # after which an attempt is given up
FETCH_BYTES = 1 << 16
LOOKUPS = threading.BoundedSemaphore(32)
"""Names that are looked up at a time, in threads, since the C library does not stop when time is over."""
LOOK_SECONDS = 0.05  # how often a thread that waits for addresses looks whether its time is over
GLOBAL_UNICAST, TRANSLATED = IPv6Network("2000::/3"), IPv6Network("64:ff9b::/96")
"""The IPv6 addresses of hosts (RFC 4291), and those that are IPv4 addresses (RFC 6052)."""
UNREACHABLE, TOO_SLOW, TOO_LARGE = "URL that cannot be reached", "URL that takes too long", "URL of too large a file"
NOT_PUBLIC, NOT_A_URL, TOO_MANY = "URL of no public address", "not a URL", "URL with too many redirects"


class UnansweredError(Exception):
    """An attempt to fetch a file that another one may do better than."""


def receive_file(url: str, file: BinaryIO, deadline: "Deadline", *, max_bytes: int, limit: str) -> str:
    """Write the file of a URL, in three attempts at most; returns its SHA-256 in hexadecimal.

    Args:
        file: that is written from its beginning at each attempt.
        max_bytes: of its size.
        limit: the key and value that say so, for errors.

    Raises:
        BadRow: if it is not one of a public address, cannot be reached, is too large, or takes too long.
    """
    for wait in (*WAITS, None):
        file.seek(0)
        file.truncate()
        try:
            return receive_once(url, file, deadline, max_bytes=max_bytes, limit=limit)
        except UnansweredError as error:
            if deadline.is_over:
                raise BadRow(TOO_SLOW, f"{url[:80]}: not all of it after {deadline.seconds:g} s") from None
            if wait is None or deadline.left < wait:
                raise BadRow(UNREACHABLE, f"{url[:80]}: {' '.join(str(error).split())[:100]}") from None
            time.sleep(wait)
    raise AssertionError("the last attempt ends the loop")


def receive_once(url: str, file: BinaryIO, deadline: "Deadline", *, max_bytes: int, limit: str) -> str:
    """The same in one attempt; raises an UnansweredError if another one may do better."""
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
                return copy_body(url, response, file, max_bytes=max_bytes, limit=limit)
    raise BadRow(TOO_MANY, f"{url[:80]}: more than {MAX_REDIRECTS}")


def copy_body(url: str, response: "HTTPResponse", file: BinaryIO, *, max_bytes: int, limit: str) -> str:
    """Write the body of an answer; returns its SHA-256 in hexadecimal."""
    size, digest = 0, hashlib.sha256()
    too_large = BadRow(TOO_LARGE, f"{url[:80]}: more than {limit}")
    if int(response.headers.get("Content-Length", 0)) > max_bytes:
        raise too_large
    # not `stream`, which in urllib3 2.2 keeps a line without an end, as large as it comes
    for block in iter(lambda: response.read(FETCH_BYTES, decode_content=False), b""):
        size += len(block)
        if size > max_bytes:
            raise too_large
        digest.update(block)
        file.write(block)
    return digest.hexdigest()


class Deadline:
    """Ends connections when their time is over, also those whose other side sends a byte now and then.

    The end of the block is the end of their time too.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
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
        self._end = min(self._end, time.monotonic())
        self._end_connections()  # of a thread that goes on
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
    addresses = list_addresses(host, port, deadline)
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


def list_addresses(host: str, port: int, deadline: Deadline) -> list[str]:
    """The addresses of a name; raises an OSError if it has none, or if they are not known in time."""
    results, slots = SimpleQueue[list[str] | Exception](), LOOKUPS
    end = time.monotonic() + SILENCE_SECONDS

    def look_up() -> None:
        try:
            entries = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            results.put(list(dict.fromkeys(str(address[0]) for *_, address in entries)))
        except (OSError, ValueError) as error:
            results.put(error)
        finally:
            slots.release()

    if not slots.acquire(timeout=max(0.0, min(SILENCE_SECONDS, deadline.left))):
        raise TimeoutError("too many names are looked up")
    try:
        threading.Thread(target=look_up, daemon=True, name="look-up").start()
    except RuntimeError as error:  # too many threads
        slots.release()
        raise OSError(str(error)) from None
    while not deadline.is_over and time.monotonic() < end:
        try:
            result = results.get(timeout=LOOK_SECONDS)
        except Empty:
            continue
        if isinstance(result, Exception):
            raise result
        return result
    raise TimeoutError("the addresses of the name are not known in time")


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
