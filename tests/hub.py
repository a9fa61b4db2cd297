"""A small server that answers as the Hugging Face hub does."""

import json
import threading
from base64 import b64decode
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
        created: the requests to create a repository.
        commits: the message of each commit, and the files that it contains by name.
        drops: the number of connections to close without an answer.
    """

    def __init__(self, repositories: dict[str, dict[str, bytes]], *, listens: bool = True) -> None:
        super().__init__(("127.0.0.1", 0), Answer, bind_and_activate=False)
        self.server_bind()  # connections are refused until `listen`
        self.listens = False
        self.created: list[dict[str, Any]] = []
        self.commits: list[tuple[str, dict[str, bytes]]] = []
        self.drops = 0
        if listens:
            self.listen()
        self.repositories = repositories
        self.fetched: list[str] = []
        self.altered: set[str] = set()

    def listen(self) -> None:
        """Begin to accept connections."""
        self.listens = True
        self.server_activate()
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def verify_request(self, *_: Any) -> bool:
        """Whether to answer a connection."""
        self.drops -= 1
        return self.drops < 0


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

    def do_POST(self) -> None:
        """Create a repository, say how its files are sent, or add a commit to it."""
        content = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/api/repos/create":
            self.server.created.append(json.loads(content))
            self.send_json({"url": f"http://{self.headers['Host']}/me/model"})
        elif "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(content)["files"]]
            self.send_json(
                {"files": [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]}
            )
        elif "/commit/" in self.path:
            header, *files = (json.loads(line)["value"] for line in content.splitlines())
            self.server.commits.append(
                (header["summary"], {file["path"]: b64decode(file["content"]) for file in files})
            )
            self.send_json(
                {"commitUrl": f"http://{self.headers['Host']}/me/model/commit/{COMMIT}", "commitOid": COMMIT}
            )
        else:
            self.send_refusal("RepoNotFound")

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
        if self.command != "HEAD":
            self.wfile.write(content)


@contextmanager
def serve_hub(
    repositories: dict[str, dict[str, bytes]], monkeypatch: pytest.MonkeyPatch, *, listens: bool = True
) -> Iterator[Hub]:
    """Serve repositories inside the block, to the hub's client in this process; if not `listens`, from `listen` on."""
    server = Hub(repositories, listens=listens)
    address = f"http://127.0.0.1:{server.server_port}"
    url = constants.HUGGINGFACE_CO_URL_TEMPLATE.removeprefix(constants.ENDPOINT)
    changes = {"ENDPOINT": address, "HUGGINGFACE_CO_URL_TEMPLATE": address + url}
    changes |= {"HF_HUB_DISABLE_TELEMETRY": True, "HF_HUB_DISABLE_XET": True, "HF_HUB_OFFLINE": False}
    for name, value in changes.items():
        monkeypatch.setattr(constants, name, value)
    yield server
    if server.listens:  # else there is no loop to end
        server.shutdown()
    server.server_close()
