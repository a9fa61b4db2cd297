"""A server on this machine whose answers are good, slow or hostile."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

CONTENT = bytes(range(256)) * 40
STEP = 0.02  # seconds between the bytes of a slow answer


class Handler(BaseHTTPRequestHandler):
    """Answers of a server that is good, slow or hostile."""

    protocol_version = "HTTP/1.1"
    server: "Server"

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        if self.path in self.server.files:
            self.answer(200, self.server.files[self.path])
            return
        getattr(self, f"answer_{self.path.strip('/').split('.')[0].split('?')[0]}")()

    def answer(self, status: int, body: bytes = b"", **headers: Any) -> None:
        """Send an answer, whose length is that of the body unless the headers say otherwise."""
        self.send_response(status)
        for name, value in ({"Content_Length": len(body)} | headers).items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(body)

    def answer_a(self) -> None:
        self.answer(200, CONTENT)

    answer_b = answer_a

    def answer_moved(self) -> None:
        self.answer(302, b"moved", Location="/a.png")

    def answer_loop(self) -> None:
        self.answer(301, Location="loop")

    def answer_missing(self) -> None:
        self.answer(404, b"none")

    def answer_private(self) -> None:
        self.answer(307, Location=f"http://127.0.0.2:{self.server.server_port}/a.png")

    def answer_local(self) -> None:
        self.answer(302, Location="file:///etc/passwd")

    def answer_busy(self) -> None:
        is_first = self.server.asked.count("/busy") == 1
        self.answer(503 if is_first else 200, b"" if is_first else CONTENT)

    def answer_large(self) -> None:
        self.answer(200, Content_Length=10**12)

    def answer_endless(self) -> None:
        self.send_response(200)
        self.send_header("Connection", "close")
        self.end_headers()
        for _ in range(10_000):
            self.wfile.write(bytes(1 << 16))

    def answer_half(self) -> None:
        self.answer(200, CONTENT[:100], Content_Length=len(CONTENT))
        self.close_connection = True

    def answer_header(self) -> None:
        for _ in range(500):
            self.wfile.write(b"H")
            time.sleep(STEP)

    def answer_body(self) -> None:
        self.send_response(200)
        self.send_header("Connection", "close")
        self.end_headers()
        self.answer_header()

    def answer_chunks(self) -> None:
        self.begin_chunks()
        for start in range(0, len(CONTENT), 1000):
            part = CONTENT[start : start + 1000]
            self.wfile.write(b"%x\r\n%s\r\n" % (len(part), part))
        self.wfile.write(b"0\r\n\r\n")

    def answer_line(self) -> None:
        self.begin_chunks()
        for _ in range(10_000):
            self.wfile.write(b"1" * (1 << 16))  # the length of a chunk, which never ends

    def begin_chunks(self) -> None:
        """Send the headers of an answer in chunks."""
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()

    def answer_nonsense(self) -> None:
        self.wfile.write(b"\0\1\2 what\r\n\r\n")
        self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing."""


class Server(ThreadingHTTPServer):
    """A server on this machine.

    Attributes:
        files: by their paths.
        asked: the paths of the requests.
    """

    daemon_threads, block_on_close = True, False

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.asked = files, list[str]()
        self.url = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print nothing about clients that have left."""


@contextmanager
def run_server(files: dict[str, bytes] | None = None) -> Iterator[Server]:
    """Run a server in a thread.

    Args:
        files: by their paths; others have the answers of `Handler`.
    """
    with Server(files or {}) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()
