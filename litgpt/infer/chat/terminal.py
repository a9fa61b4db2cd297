"""Read messages from a terminal or a pipe, and write answers as they arrive."""

import sys
import termios
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager

from prompt_toolkit import PromptSession
from prompt_toolkit.application import get_app
from prompt_toolkit.filters import Condition
from prompt_toolkit.utils import get_cwidth
from rich.console import Console

PROMPT_LABEL, REPLY_LABEL = ">> Prompt: ", ">> Reply: "
SUBMIT, QUITS = "!submit", ("!quit", "!exit", "/quit", "/exit")
TAB_SPACES = " " * 4


class ChatTerminal:
    """Where a chat takes place.

    Args:
        multiline: a message has lines up to one with `!submit`.

    Attributes:
        is_interactive: whether a person types the messages; otherwise they come from a pipe or a file.
    """

    def __init__(self, *, multiline: bool) -> None:
        self._multiline = multiline
        self.is_interactive = sys.stdin.isatty()
        self._output, self._errors = build_console(is_error=False), build_console(is_error=True)
        self._session: PromptSession[str] | None = None
        if self.is_interactive and sys.stdout.isatty():
            incomplete = Condition(lambda: not is_complete(get_app().current_buffer.text))
            self._session = PromptSession(multiline=incomplete if multiline else False)

    def read_message(self) -> str | None:
        """The next message; None if there is none, it is empty, or it ends the chat."""
        try:
            text = self._read_text()
        except (EOFError, KeyboardInterrupt):
            return None
        lines = text.rstrip().split("\n")
        if self._multiline and lines[-1].strip().lower() == SUBMIT:
            lines.pop()
        text = "\n".join(lines)
        return None if not text.strip() or lines[-1].strip().lower() in QUITS else text

    def _read_text(self) -> str:
        prompt = f"{PROMPT_LABEL}(end with {SUBMIT} on a line of its own)\n" if self._multiline else PROMPT_LABEL
        if self._session is not None:
            return self._session.prompt([("bold fg:ansicyan", prompt)])
        lines = [input(prompt)]
        try:
            while self._multiline and not is_complete("\n".join(lines)):
                lines.append(input())
        except EOFError:  # the end of a file ends its last message
            pass
        if not self.is_interactive:
            print(*lines, sep="\n")  # what a terminal would show
        return "\n".join(lines)

    def start_reply(self) -> "ReplyWriter":
        """Write the beginning of a reply."""
        self._output.print(REPLY_LABEL, end="", style="bold green")
        return ReplyWriter(self._output.width if sys.stdout.isatty() else None, len(REPLY_LABEL))

    def print_line(self, line: str = "") -> None:
        """Write a line of the program to stdout."""
        self._output.print(line)

    def print_notice(self, line: str) -> None:
        """Write a line about the last reply to stderr."""
        self._errors.print(line, style="dim")

    def print_error(self, line: str) -> None:
        """Write an error to stderr."""
        self._errors.print(line, style="red")


def build_console(*, is_error: bool) -> Console:
    """stdout or stderr, with lines broken between words if it is a terminal."""
    console = Console(highlight=False, markup=False, stderr=is_error)
    console.soft_wrap = not console.is_terminal
    return console


@contextmanager
def hide_typed_text() -> Iterator[None]:
    """Do not show what is typed inside the block, such as ^C; the next prompt shows it."""
    if not sys.stdin.isatty():
        yield
        return
    terminal = sys.stdin.fileno()
    earlier = termios.tcgetattr(terminal)
    hidden = [*earlier[:3], earlier[3] & ~termios.ECHO, *earlier[4:]]
    termios.tcsetattr(terminal, termios.TCSANOW, hidden)
    try:
        yield
    finally:
        termios.tcsetattr(terminal, termios.TCSANOW, earlier)


def is_complete(text: str) -> bool:
    """Whether text that is typed in several lines is a whole message: its last line ends it, or it is a command."""
    lines = text.strip().split("\n")
    return lines[-1].strip().lower() in (SUBMIT, *QUITS) or (len(lines) == 1 and text.startswith("/"))


class ReplyWriter:
    """Writes a reply to stdout as it arrives.

    Args:
        columns: of the terminal, whose lines are broken between words; None for the text as it is.
        column: where the reply begins.
    """

    def __init__(self, columns: int | None, column: int) -> None:
        self._wrapper = None if columns is None else WordWrapper(columns, column)

    def write(self, piece: str) -> None:
        """Write a piece of the reply."""
        print(piece if self._wrapper is None else self._wrapper.push(piece), end="", flush=True)

    def finish(self) -> None:
        """Write what is left, and end the line."""
        print("" if self._wrapper is None else self._wrapper.finish(), flush=True)


class WordWrapper:
    """Breaks the lines of a text between words as it arrives; a word is passed on when its last character is known.

    Words longer than a line are broken by the terminal. Control characters, with which a text could change the
    terminal, become visible.
    """

    def __init__(self, columns: int, column: int) -> None:
        self._columns, self._column = columns, column
        self._spaces, self._word, self._continues_word = "", "", False

    def push(self, piece: str) -> str:
        """The text that can be written after one more piece."""
        text = ""
        for character in piece:
            is_wide = get_cwidth(character) == 2  # lines may be broken at each character of Chinese and Japanese
            if character.isspace() or is_wide:
                text += self.finish()
            if character == "\n":
                self._spaces, self._column = "", 0
                text += character
            elif character.isspace():
                self._spaces += TAB_SPACES if character == "\t" else character
            else:
                is_control = unicodedata.category(character) == "Cc"
                self._word += repr(character)[1:-1] if is_control else character
                if is_wide:
                    text += self.finish()
                elif get_cwidth(self._word) >= self._columns:
                    text += self._write_word()
                    self._continues_word = True
        return text

    def finish(self) -> str:
        """The text that is left after the last piece."""
        text = self._write_word() if self._word else ""
        self._continues_word = False
        return text

    def _write_word(self) -> str:
        """The word so far, after a space or at the start of a line."""
        before = self._spaces
        end = self._column + get_cwidth(before + self._word)
        if end > self._columns and self._column > 0 and not self._continues_word:
            before, self._column = "\n", 0
        text, self._spaces, self._word = before + self._word, "", ""
        self._column += get_cwidth(text.removeprefix("\n"))
        self._column -= self._columns * ((self._column - 1) // self._columns)
        return text
