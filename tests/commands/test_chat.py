"""`litgpt chat` from a pipe and in a terminal."""

import fcntl
import io
import json
import os
import pty
import re
import select
import signal
import struct
import sys
import termios
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from litgpt.cli import main
from litgpt.data.read.row_sources import read_rows
from litgpt.infer.chat.model import ChatModel
from tests.chat_model import write_chat_model
from tests.processes import join_ranks, start_ranks

Chat = Callable[..., tuple[str, str]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat_model(tmp_path_factory.mktemp("chat") / "tiny", block_size=4096)


@pytest.fixture
def chat(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Chat:
    def run(text: str, *flags: str) -> tuple[str, str]:
        monkeypatch.setattr("sys.stdin", io.StringIO(text))
        assert main(["chat", str(folder), "--temperature", "0", "--max_new_tokens", "12", *flags]) == 0
        return tuple(capsys.readouterr())  # type: ignore[return-value]

    return run


def test_a_chat_from_a_pipe_is_data_to_train_on(chat: Chat, folder: Path, tmp_path: Path, capsys: Any) -> None:
    out, err = chat("the fox\nthe dog\n\nnot read\n")
    assert out.startswith("Now chatting with tiny.\n") and "not read" not in out
    replies = re.findall(r">> Prompt: (.*)\n>> Reply: ((?:.*\n)*?)\n(?=>>)", out)
    assert [prompt for prompt, _ in replies] == ["the fox", "the dog"]
    assert len(re.findall(r"^Time for inference: .* sec total, .* tokens/sec, 12 tokens, context \d%$", err, re.M)) == 2
    assert err.count("The answer ended at max_new_tokens: 12;") == 2
    assert "\x1b" not in out + err
    path = tmp_path / "chat.jsonl"
    chat(f"the fox\nthe dog\n/save {path}\n")
    messages = json.loads(path.read_text())["messages"]
    assert [message["content"] for message in messages[::2]] == ["the fox", "the dog"]
    assert [f"{message['content']}\n" for message in messages[1::2]] == [reply for _, reply in replies]
    words = ["data", "inspect", "Conversations", "--data.sources", str(path), "--tokenizer_dir", str(folder)]
    assert main([*words, "--data.cache_dir", str(tmp_path / "cache")]) == 0
    assert "the dog" in capsys.readouterr().out


def test_commands_of_the_chat(chat: Chat, tmp_path: Path) -> None:
    path = tmp_path / "chat.jsonl"
    lines = ["/save x.jsonl", "/system be kind", "the fox", f"/save {path}", f"/save {path}", "/save x.txt", "/help"]
    lines += ["/stop a", "/reset now", "/system", f"/save {tmp_path}/none/x.jsonl", "/reset", "/usr/bin is a path"]
    out, err = chat("\n".join(lines) + "\n")
    [(_, row)] = read_rows(path)
    assert [message["role"] for message in row["messages"]] == ["system", "user", "assistant"]
    assert row["messages"][0]["content"] == "be kind" and row["messages"][1]["content"] == "the fox"
    assert row["messages"][2]["content"] in out
    assert [line for line in err.splitlines() if line.startswith("/")] == [
        "/save: there is no answer to save; write a message first",
        f"/save: {path} exists, and is not overwritten; use another name",
        "/save: 'x.txt' is not the name of a .jsonl file; write /save chat.jsonl, for example",
        "/stop: not a command; use /system, /reset, /image, /video, /audio, /save, /help, or begin a message with a "
        "space",
        "/reset: 'now' has no effect; leave it out",
        f"/save: {tmp_path}/none/x.jsonl cannot be written (No such file or directory); use another name",
    ]
    assert out.count(">> Reply: ") == 2 and "\n/system TEXT  set the system message;" in out


def test_a_model_without_a_format_continues_texts(chat: Chat) -> None:
    out, _ = chat("the fox\nthe fox\n", "--chat_template", "false")
    assert "the model continues the text of each prompt, and sees no other." in out
    first, second = re.findall(r">> Reply: (.*?)\n\n>>", out, re.S)
    assert first == second


class TypedText(io.StringIO):
    """What a person types in a terminal."""

    terminal = -1

    def isatty(self) -> bool:
        return True

    def fileno(self) -> int:
        return self.terminal


def test_ctrl_c_ends_the_answer_only(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = ChatModel.answer
    echoes: list[int] = []

    def read_echo() -> int:
        return termios.tcgetattr(TypedText.terminal)[3] & termios.ECHO  # type: ignore[no-any-return]

    def interrupt(self: ChatModel, *arguments: Any, on_text: Any, **settings: Any) -> Any:
        def raise_signal(piece: str) -> None:
            on_text(piece)
            echoes.append(read_echo())
            signal.raise_signal(signal.SIGINT)

        return answer(self, *arguments, on_text=raise_signal, **settings)

    master, TypedText.terminal = pty.openpty()
    monkeypatch.setattr(ChatModel, "answer", interrupt)
    monkeypatch.setattr(io, "StringIO", TypedText)
    out, err = chat("the fox\nthe dog\n")
    assert err.count(", 1 tokens, context") == err.count("\nStopped.\n") == out.count(">> Reply: ") == 2
    assert echoes == [0, 0] and read_echo()  # ^C is not shown
    os.close(master)
    os.close(TypedText.terminal)


def chat_in_terminal(path: str, *argv: str) -> int:
    """Run `litgpt chat` in a terminal, of which this process is in the foreground."""
    os.setsid()
    terminal = os.open(path, os.O_RDWR)
    fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("4H", 24, 60, 0, 0))
    for number in (0, 1, 2):
        os.dup2(terminal, number)
    sys.stdin = os.fdopen(0)
    os.environ.update(TERM="xterm", PROMPT_TOOLKIT_NO_CPR="1")
    return main(["chat", *argv])


class Screen:
    """What is written to a terminal, and keys that are typed."""

    def __init__(self, master: int) -> None:
        self.master, self.text = master, ""

    def wait_for(self, text: str) -> str:
        """Everything up to a text that appears; the next call begins after it."""
        while text not in self.text:
            assert select.select([self.master], [], [], 60)[0], self.text
            self.text += os.read(self.master, 65536).decode(errors="replace")
        before, _, self.text = self.text.partition(text)
        return before

    def type(self, keys: str) -> None:
        os.write(self.master, keys.encode())


@pytest.mark.slow
def test_a_chat_in_a_terminal(folder: Path, tmp_path: Path) -> None:
    """Lines are edited and recalled, Ctrl-C ends an answer and not the program, and Ctrl-D ends the program."""
    master, slave = pty.openpty()
    flags = ["--temperature", "0", "--max_new_tokens", "4000"]
    processes = start_ranks(chat_in_terminal, os.ttyname(slave), str(folder), *flags, folder=tmp_path)
    try:
        screen = Screen(master)
        screen.wait_for("Now chatting with tiny.")
        screen.wait_for(">> Prompt: ")
        screen.type("the fux\x7f\x7fox\r")
        for _ in range(2):
            screen.wait_for(">> Reply: ")
            screen.wait_for("Y")
            screen.type("\x03")
            stats = screen.wait_for("Stopped.")
            assert 0 < int(re.findall(r"(\d+) tokens, context", stats)[0]) < 3900
            screen.wait_for(">> Prompt: ")
            screen.type("\x1b[A\r")  # the last line again
        screen.wait_for(">> Reply: ")
        screen.type("\x03")
        screen.wait_for(">> Prompt: ")
        screen.type("/save chat.jsonl\r")
        screen.wait_for("Saved to chat.jsonl.")
        screen.wait_for(">> Prompt: ")
        screen.type("\x04")
        assert join_ranks(processes) == [0]
        [line] = (tmp_path / "chat.jsonl").read_text().splitlines()
        assert {message["content"] for message in json.loads(line)["messages"][::2]} == {"the fox"}
    finally:
        processes[0].kill()
    os.close(master)
    os.close(slave)
