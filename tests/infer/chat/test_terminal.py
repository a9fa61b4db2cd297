"""Lines of a chat: breaks between words, whatever the pieces, and messages from a pipe."""

import io
import itertools
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prompt_toolkit.utils import get_cwidth

from litgpt.infer.chat.terminal import ChatTerminal, WordWrapper, is_complete


def wrap(pieces: list[str], columns: int, column: int = 0) -> str:
    wrapper = WordWrapper(columns, column)
    return "".join([*map(wrapper.push, pieces), wrapper.finish()])


@settings(max_examples=200, deadline=None)
@given(
    st.text("ab \n漢é", max_size=60), st.lists(st.integers(0, 60), max_size=8), st.integers(4, 12), st.integers(0, 4)
)
def test_lines_are_broken_between_words_only(text: str, cuts: list[int], columns: int, column: int) -> None:
    places = [0, *sorted(cuts), len(text)]
    pieces = [text[start:end] for start, end in itertools.pairwise(places)]
    written = wrap(pieces, columns, column)
    assert written == wrap([text], columns, column)
    assert "".join(written.split()) == "".join(text.split())
    for line in ("-" * column + written).split("\n"):
        for word in re.finditer(r"[^\s漢]+", line):
            start, end = (get_cwidth(line[:place]) for place in word.span())
            is_indented = not line[: word.start()].strip()
            assert start // columns == (end - 1) // columns or end - start > columns or is_indented


def test_examples_of_broken_lines() -> None:
    assert wrap(["the fox jum", "ps over"], 10) == "the fox\njumps over"
    assert wrap(["a fox"], 12, column=10) == "a\nfox"
    assert wrap(["abcdefghijklm n"], 10) == "abcdefghijklm n"  # the terminal breaks the first word
    assert WordWrapper(10, 0).push("abcdefghijklm") == "abcdefghij"  # at once, not when the word ends
    assert wrap(["a abcdefghijklm nop qrs"], 10) == "a\nabcdefghijklm nop\nqrs"
    assert wrap(["漢字漢字漢"], 6) == "漢字漢\n字漢"
    assert wrap(["if x:\n\ty\n"], 20) == "if x:\n    y\n"
    assert wrap(["\x1b[2J\x07 café"], 40) == "\\x1b[2J\\x07 café"


def read_messages(text: str, monkeypatch: pytest.MonkeyPatch, *, multiline: bool = False) -> list[str]:
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    terminal = ChatTerminal(multiline=multiline)
    assert not terminal.is_interactive
    return list(iter(terminal.read_message, None))


@pytest.mark.parametrize("end", ["", "\nafter", "!quit\nafter", " !EXIT \nafter"])
def test_messages_of_a_pipe(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], end: str) -> None:
    assert read_messages(f"a fox\n  two dogs \n{end}", monkeypatch) == ["a fox", "  two dogs"]
    assert capsys.readouterr().out.startswith(">> Prompt: a fox\n>> Prompt:   two dogs \n>> Prompt: ")


def test_messages_of_several_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "a fox\n\ntwo dogs\n!submit\n/help\nthree\n!submit\n"
    assert read_messages(text + "!submit\nafter", monkeypatch, multiline=True) == [
        "a fox\n\ntwo dogs",
        "/help",
        "three",
    ]
    assert read_messages(text + "four\n!exit\nafter", monkeypatch, multiline=True)[3:] == []
    assert read_messages("a\nb", monkeypatch, multiline=True) == ["a\nb"]
    assert not is_complete("") and not is_complete("a\n/help") and is_complete("/system a") and is_complete("!quit")
