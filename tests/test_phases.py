"""What takes long says what it is, on a terminal and without one."""

import io
import time
from collections.abc import Iterator

import pytest
from rich.console import Console

from litgpt.phases import phase, show_phases
from litgpt.train.console import RunConsole


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("litgpt.phases.SHOW_AFTER", 0.1)
    monkeypatch.setattr("litgpt.phases.REFRESH_SECONDS", 0.02)
    return


def shown(*, terminal: bool, enabled: bool = True) -> str:
    """What a run prints around a long validation in a longer phase, and a short save."""
    file = io.StringIO()
    console = RunConsole(total_steps=9, enabled=enabled, console=Console(file=file, force_terminal=terminal, width=80))
    with show_phases(console.show_phase):
        with phase("loading the data", 200, percent=True) as loading:
            loading.advance(50)
            time.sleep(0.25)
        with console:
            console.update({"step": 4.0, "loss": 2.5})
            with phase("validating", 100) as validating:
                for _ in range(12):
                    validating.advance()
                    time.sleep(0.03)
            with phase("saving"):
                time.sleep(0.02)
            console.update({"step": 5.0, "loss": 2.0})
    return file.getvalue()


def test_without_a_terminal_a_phase_is_one_line() -> None:
    assert shown(terminal=False).splitlines() == [
        "loading the data ...",
        "step 4/9 | loss 2.500",
        "validating ...",
        "step 5/9 | loss 2.000",
    ]


def test_on_a_terminal_the_progress_line_begins_with_the_phase() -> None:
    text = shown(terminal=True)
    assert "loading the data 25%, 0:00:00" in text
    assert "validating 12/100, 0:00:00 | step 4/9 | loss 2.500" in text
    assert "saving" not in text  # it took no time
    assert text.rindex("step 5/9 | loss 2.000") > text.rindex("validating")
    lines = text.replace("\r", "\n").splitlines()
    assert max(map(len, lines)) < 90  # 80 columns and the codes of the terminal
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h")  # the cursor is back


def test_other_ranks_show_no_phase() -> None:
    assert shown(terminal=True, enabled=False) == shown(terminal=False, enabled=False) == ""


def test_the_innermost_long_phase_is_shown_and_the_outer_one_again() -> None:
    names: list[str | None] = []
    with show_phases(lambda entry: names.append(entry and entry.name)), phase("outer"):
        time.sleep(0.15)
        with phase("inner"):
            time.sleep(0.3)
        time.sleep(0.1)
    assert list(dict.fromkeys(names)) == ["outer", "inner", None]
    assert names[-2:] == ["outer", None]
