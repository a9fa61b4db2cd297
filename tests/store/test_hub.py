"""`litgpt download` against a small server that answers as the hub does."""

import json
import threading
from collections.abc import Callable, Iterator
from hashlib import sha1, sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file

from litgpt.commands.download import run
from litgpt.errors import UserError
from litgpt.recipe.store_commands import Download
from litgpt.store.hub import select_files
from litgpt.store.save_model import save_model_folder
from tests.store.models import assert_loads, random_model, small, weights

COMMIT = "c" * 40


class Hub(ThreadingHTTPServer):
    """A hub with one open repository of given files, and one that is gated."""

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.files = files
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
    server: Hub

    def do_HEAD(self) -> None:
        self.do_GET()

    def log_message(self, *_: object) -> None:
        """Keep quiet."""

    def do_GET(self) -> None:
        path, files = self.path.split("?")[0], self.server.files
        if path.startswith("/api/models/org/tiny/tree/"):
            self.send_json([{"type": "file", "path": name, "size": len(files[name]), "oid": "0"} for name in files])
        elif path == "/api/models/org/tiny":
            siblings = [{"rfilename": name, **list_file(name, content)} for name, content in files.items()]
            self.send_json({"id": "org/tiny", "sha": COMMIT, "siblings": siblings})
        elif path.startswith(f"/org/tiny/resolve/{COMMIT}/"):
            name = path.split("/", 5)[5]
            if self.command == "GET":
                self.server.fetched.append(name)
            sent = files[name][:-1] + b"?" if name in self.server.altered else files[name]
            self.send_bytes(sent, {"ETag": f'"{sha1(files[name]).hexdigest()}"', "X-Repo-Commit": COMMIT})
        else:
            gated = "gated" in path
            self.send_response(403 if gated else 404)
            self.send_header("X-Error-Code", "GatedRepo" if gated else "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

    def send_json(self, value: Any) -> None:
        self.send_bytes(json.dumps(value).encode(), {})

    def send_bytes(self, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(200)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    model = random_model(small("Llama-2-7b-hf"))
    save_model_folder(tmp_path / "source", config=model.config, tensors=weights(model))
    (tmp_path / "source" / "model_config.yaml").unlink()
    files = {path.name: path.read_bytes() for path in (tmp_path / "source").iterdir()}
    trap = {
        "modeling_evil.py": b"1/0",
        "tokenizer.py": b"1/0",
        "pytorch_model.bin": b"no",
        "onnx/model.safetensors": b"",
    }
    server = Hub(files | trap | {"tokenizer.json": b"{}", "../outside.json": b"{}"})
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def run_client(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., list[str]]:
    """A function that does downloads given as settings, and returns what a user would read."""
    address = f"http://127.0.0.1:{hub.server_port}"
    url = constants.HUGGINGFACE_CO_URL_TEMPLATE.removeprefix(constants.ENDPOINT)
    changes = {"ENDPOINT": address, "HUGGINGFACE_CO_URL_TEMPLATE": address + url}
    changes |= {"HF_HUB_DISABLE_TELEMETRY": True, "HF_HUB_DISABLE_XET": True}
    for name, value in changes.items():
        monkeypatch.setattr(constants, name, value)

    def run_all(*downloads: dict[str, Any], offline: bool = False) -> list[str]:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        for settings in downloads:
            recipe = Download(**{**settings, "checkpoint_dir": Path(settings["checkpoint_dir"])})
            assert "hf_secret" not in repr(recipe)
            try:
                run(recipe)
            except UserError as error:
                print("error:", error)
        out, err = capsys.readouterr()
        assert "hf_secret" not in out + err
        return out.splitlines()

    return run_all


def test_a_model_is_fetched_checked_and_ready_to_load(
    hub: Hub, run_client: Callable[..., list[str]], tmp_path: Path
) -> None:
    place = {"repo_id": "org/tiny", "checkpoint_dir": str(tmp_path / "a"), "access_token": "hf_secret"}
    messages = run_client(
        place,
        place,
        {**place, "checkpoint_dir": str(tmp_path / "b"), "tokenizer_only": True},
        {**place, "checkpoint_dir": str(tmp_path / "c"), "dtype": "bfloat16"},
        {**place, "repo_id": "org/gated"},
        {**place, "repo_id": "org/absent"},
        {**place, "repo_id": "../../etc/passwd"},
        {**place, "repo_id": "pythia-14"},
    )
    folder = tmp_path / "a" / "org" / "tiny"
    assert messages[:4] == [f"{folder}: ready"] * 2 + [f"{tmp_path / name / 'org' / 'tiny'}: ready" for name in "bc"]
    for line, reason in zip(messages[4:], ["licence", "not on the hub", "not org/name", "did you mean"], strict=True):
        assert line.startswith("error: ") and reason in line
    names = ["config.json", "generation_config.json", "model.safetensors", "model_config.yaml", "tokenizer.json"]
    assert sorted(path.name for path in folder.iterdir() if path.name != ".cache") == names
    assert hub.fetched.count("model.safetensors") == 2, "the second download went on where the first had ended"
    assert_loads(folder, random_model(small("Llama-2-7b-hf")))
    assert not list((tmp_path / "b").rglob("*.safetensors"))
    cast = load_file(tmp_path / "c" / "org" / "tiny" / "model.safetensors")
    assert {tensor.dtype for tensor in cast.values()} == {torch.bfloat16}


def test_a_hub_that_does_not_answer_has_one_line(
    hub: Hub, run_client: Callable[..., list[str]], tmp_path: Path
) -> None:
    hub.shutdown()
    hub.server_close()
    (line,) = run_client({"repo_id": "org/tiny", "checkpoint_dir": str(tmp_path), "access_token": "hf_secret"})
    assert "cannot be reached" in line and "put the model's files into" in line


def test_a_client_that_is_to_stay_offline_says_so(run_client: Callable[..., list[str]], tmp_path: Path) -> None:
    (line,) = run_client({"repo_id": "org/tiny", "checkpoint_dir": str(tmp_path)}, offline=True)
    assert "HF_HUB_OFFLINE is set" in line and not list(tmp_path.glob("org/*"))


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_bytes_that_the_hub_does_not_list_are_not_kept(
    hub: Hub, run_client: Callable[..., list[str]], tmp_path: Path, name: str
) -> None:
    hub.altered = {name}
    place = {"repo_id": "org/tiny", "checkpoint_dir": str(tmp_path / "new")}
    (line,) = run_client(place)
    assert line.startswith("error: ") and name in line and "not those that the hub lists" in line
    assert not (tmp_path / "new" / "org" / "tiny" / name).exists()
    hub.altered = set()
    assert run_client(place) == [f"{tmp_path / 'new' / 'org' / 'tiny'}: ready"]


@pytest.mark.parametrize(
    ("names", "selected"),
    [
        (["a.py", "tokenizer.py", "README.md", "training_args.bin", "optimizer.bin"], []),
        (["pytorch_model.bin", "model.safetensors", "x/model.safetensors"], ["model.safetensors"]),
        (["pytorch_model-00001-of-00001.bin"], ["pytorch_model-00001-of-00001.bin"]),
        (["model-1.safetensors", "model.safetensors.index.json", "consolidated.safetensors"], None),
        (["weights.safetensors", "tokenizer.model", "../up.safetensors"], ["tokenizer.model", "weights.safetensors"]),
        (["chat_template.jinja", "vocab.json", "tokenizer_config.json", "config.json"], None),
    ],
)
def test_only_needed_files_are_selected(names: list[str], selected: list[str] | None) -> None:
    expected = [name for name in names if "consolidated" not in name] if selected is None else selected
    assert sorted(select_files(names, tokenizer_only=False)) == sorted(expected)
