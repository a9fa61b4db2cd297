"""A small server that answers as the Hugging Face hub does."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha1, sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from huggingface_hub import constants

COMMIT = "c" * 40


class Hub(ThreadingHTTPServer):
    """A hub with open repositories of given files; one whose name contains `gated` is gated.

    Args:
        repositories: the files by name, by org/name.

    Attributes:
        fetched: names of the files that were downloaded.
        altered: names of files that are sent with another last byte.
    """

    def __init__(self, repositories: dict[str, dict[str, bytes]]) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.repositories = repositories
        self.fetched: list[str] = []
        self.altered: set[str] = set()


def list_file(name: str, content: bytes) -> dict[str, Any]:
    """What the hub says of a file's bytes: their SHA-256 if they are weights, else git's hash."""
    if name.endswith(".safetensors"):
        return {
            "size": len(content),
            "lfs": {"sha256": sha256(content).hexdigest(), "size": len(content), "pointerSize": 1},
        }
    return {"size": len(content), "blobId": sha1(b"blob %d\0" % len(content) + content).hexdigest()}


class Answer(BaseHTTPRequestHandler):
    """Answers the requests that the hub's client makes to list and download a model."""

    server: Hub

    def do_HEAD(self) -> None:
        """Answer without the content."""
        self.do_GET()

    def log_message(self, *_: object) -> None:
        """Keep quiet."""

    def do_GET(self) -> None:
        """Answer with a repository, its tree, or one of its files."""
        path = self.path.split("?")[0]
        for repository, files in self.server.repositories.items():
            if path.startswith(f"/api/models/{repository}/tree/"):
                self.send_json([{"type": "file", "path": name, "size": len(files[name]), "oid": "0"} for name in files])
                break
            if path == f"/api/models/{repository}":
                siblings = [{"rfilename": name, **list_file(name, content)} for name, content in files.items()]
                self.send_json({"id": repository, "sha": COMMIT, "siblings": siblings})
                break
            if path.startswith(f"/{repository}/resolve/{COMMIT}/"):
                self.send_file(path.split("/", 5)[5], files)
                break
        else:
            self.send_refusal("GatedRepo" if "gated" in path else "RepoNotFound")

    def send_refusal(self, reason: str) -> None:
        """Refuse access to a repository."""
        self.send_response(403 if reason == "GatedRepo" else 404)
        self.send_header("X-Error-Code", reason)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def send_file(self, name: str, files: dict[str, bytes]) -> None:
        """Send a file of a repository."""
        if self.command == "GET":
            self.server.fetched.append(name)
        sent = files[name][:-1] + b"?" if name in self.server.altered else files[name]
        self.send_bytes(sent, {"ETag": f'"{sha1(files[name]).hexdigest()}"', "X-Repo-Commit": COMMIT})

    def send_json(self, value: Any) -> None:
        """Send a value as JSON."""
        self.send_bytes(json.dumps(value).encode(), {})

    def send_bytes(self, content: bytes, headers: dict[str, str]) -> None:
        """Send bytes with headers."""
        self.send_response(200)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)


@contextmanager
def serve_hub(repositories: dict[str, dict[str, bytes]], monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Serve repositories inside the block, to the hub's client in this process."""
    server = Hub(repositories)
    address = f"http://127.0.0.1:{server.server_port}"
    url = constants.HUGGINGFACE_CO_URL_TEMPLATE.removeprefix(constants.ENDPOINT)
    changes = {"ENDPOINT": address, "HUGGINGFACE_CO_URL_TEMPLATE": address + url}
    changes |= {"HF_HUB_DISABLE_TELEMETRY": True, "HF_HUB_DISABLE_XET": True, "HF_HUB_OFFLINE": False}
    for name, value in changes.items():
        monkeypatch.setattr(constants, name, value)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()
