"""Phases of a command: one that takes more than two seconds says what it does.

Any room opens a phase; the command decides who shows it. A thread looks twice a second whether there is one to show, so
a phase that is one long call is shown as well, and short ones cost nothing.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SHOW_AFTER = 2.0  # seconds
REFRESH_SECONDS = 0.5  # seconds between looks


class Phase:
    """A phase in progress.

    Args:
        name: what is done, such as `validating`.
        total: the number of things to do; None if it is not known.
        percent: show the percentage that is done instead of both numbers.
    """

    def __init__(self, name: str, total: int | None = None, *, percent: bool = False) -> None:
        self.name, self.total, self.percent = name, total, percent
        self.done: Callable[[], float] = lambda: self.count
        self.count = 0
        self.start = time.monotonic()
        self.is_shown = False

    def advance(self, count: int = 1) -> None:
        """Count things that are done."""
        self.count += count

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.start

    def describe(self) -> str:
        """The phase and how far it is."""
        done = self.done()
        if not self.total:
            return f"{self.name} {done:,.0f}" if done else self.name
        return f"{self.name} {done / self.total:.0%}" if self.percent else f"{self.name} {done:,.0f}/{self.total:,}"


Display = Callable[[Phase | None], None]
"""Shows a phase, twice a second while it lasts; called with None when it has ended."""

open_phases: list[Phase] = []
displays: list[Display] = []  # the last one is in use


@contextmanager
def phase(name: str, total: int | None = None, *, percent: bool = False) -> Iterator[Phase]:
    """Open a phase for the block; the arguments are those of `Phase`."""
    entry = Phase(name, total, percent=percent)
    open_phases.append(entry)
    try:
        yield entry
    finally:
        open_phases.remove(entry)
        if entry.is_shown:
            displays[-1](None)


@contextmanager
def show_phases(display: Display) -> Iterator[None]:
    """Show the phases of the block that take more than `SHOW_AFTER` seconds, the innermost one of them."""
    stopped = threading.Event()

    def show() -> None:
        while not stopped.wait(REFRESH_SECONDS):
            entry = next((entry for entry in reversed(open_phases) if entry.seconds >= SHOW_AFTER), None)
            if displays[-1] is display and entry is not None:
                entry.is_shown = True
                display(entry)

    displays.append(display)
    thread = threading.Thread(target=show, name="phases", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join()
        displays.remove(display)
