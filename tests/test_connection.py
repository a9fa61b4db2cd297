"""The hub is looked for once and for seconds at most, before a command imports what it needs to train."""

import socket
import threading
from pathlib import Path

import pytest
from huggingface_hub import constants

from litgpt import connection
from litgpt.cli import main
from litgpt.connection import check_hub_connection


@pytest.fixture(autouse=True)
def _no_proxy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(connection, "getproxies", dict)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # where nothing listens
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


@pytest.mark.parametrize(
    ("line", "key", "target"),
    [
        ("finetune org/absent --data Conversations --data.sources a", "checkpoint_dir: org/absent", "org/absent"),
        ("dpo pythia-14m --data.sources a", "checkpoint_dir: pythia-14m", "EleutherAI/pythia-14m"),
        ("generate org/absent --prompt a", "checkpoint_dir: org/absent", "org/absent"),
    ],
)
def test_a_model_that_is_neither_here_nor_within_reach_is_one_line(line, key, target, capsys) -> None:
    assert main(line.split()) == 1
    (error,) = capsys.readouterr().err.splitlines()
    cure = f"check the network, or put its files into checkpoints/{target}"
    assert error.startswith(f"litgpt: error: {key} is not a folder here: the hub cannot be reached (")
    assert "127.0.0.1: Connection refused" in error and error.endswith(cure)


def test_data_that_are_neither_here_nor_within_reach_are_one_line(capsys) -> None:
    Path("model").mkdir()
    assert main(["finetune", "model", "--data", "Conversations", "--data.sources", "org/rows"]) == 1
    (error,) = capsys.readouterr().err.splitlines()
    assert "data: org/rows: no such file or folder, and cannot be downloaded from the hub (127.0.0.1: Conn" in error


def test_a_name_that_is_not_resolved_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    waiting = threading.Event()

    def resolve(*_arguments: object, **_settings: object) -> socket.socket:
        waiting.wait(60)
        return socket.socket()

    monkeypatch.setattr(connection, "CONNECT_SECONDS", 0.05)
    monkeypatch.setattr(socket, "create_connection", resolve)
    with pytest.raises(ConnectionError, match=r"127\.0\.0\.1: no answer in 0\.05 s"):
        check_hub_connection()
    waiting.set()


def test_a_proxy_is_left_to_the_client(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "getproxies", lambda: {"http": "http://proxy:1"})
    monkeypatch.setattr(connection, "proxy_bypass", lambda _host: False)
    check_hub_connection()


def test_a_client_that_stays_offline_says_so(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert main(["generate", "org/absent", "--prompt", "a"]) == 1
    assert "HF_HUB_OFFLINE is set, so nothing is fetched" in capsys.readouterr().err
