"""Reports of hangs: the Python stacks of this rank, written when a step takes longer than a timeout."""

import faulthandler
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

POLL_SECONDS = 0.5  # seconds between looks whether the stacks have been written


class StackReport:
    """Writes the stacks of all threads of this rank into a file, if a step takes longer than a timeout.

    The timer is that of faulthandler, which needs no lock of the interpreter, so that it also works while a call into a
    library never returns. A context manager; without a report, its file is removed at the end.

    Args:
        folder: for the files of all ranks, which are appended to.
        minutes: the timeout of a step, `parallel.timeout_minutes`.
        notify: prints a line.

    Attributes:
        message: what takes too long on any rank, and the folder of the stacks; empty if nothing does.
        timed_out: whether this rank is one of those.
    """

    def __init__(self, folder: Path, rank: int, *, minutes: float, notify: Callable[[str], None]) -> None:
        self.folder, self.minutes, self.notify = folder, minutes, notify
        self.path = folder / f"rank-{rank:05d}.txt"
        self.message, self.activity, self.timed_out = "", "", False
        self._lock, self._closed = threading.Lock(), threading.Event()

    def __enter__(self) -> "StackReport":
        self.folder.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("ab", buffering=0)
        self._size = self._measure()
        active.append(self)
        threading.Thread(target=self._run, name="stacks", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        active.remove(self)
        self._file.close()
        with suppress(OSError):  # other ranks have theirs
            if not self.path.stat().st_size:
                self.path.unlink()
            self.folder.rmdir()

    @contextmanager
    def limit_time(self, activity: str) -> Iterator[None]:
        """Write the stacks if the block takes longer than the timeout; `activity` says what it does."""
        self.activity = activity
        faulthandler.dump_traceback_later(60 * self.minutes, file=self._file)
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()
        if self.message:  # not after an exception, whose cause the message may be
            self._forget()

    def poll(self) -> str:
        """The message, which is printed the first time, if this rank's timer has written the stacks; else empty."""
        with self._lock:
            if not self.message and self._measure() > self._size:
                self.timed_out = True
                limit = f"parallel.timeout_minutes: {self.minutes:g}"
                where = f"the Python stacks of all ranks are in {self.folder}"
                self._tell(f"{self.activity} has taken longer than {limit}; {where}")
            return self.message if self.timed_out else ""

    def write(self, message: str) -> None:
        """Write the stacks now, because another rank has told what takes too long, unless they have been written."""
        with self._lock:
            if not self.message:
                faulthandler.dump_traceback(file=self._file)
                self._tell(message)

    def _tell(self, message: str) -> None:
        self.message = message
        self.notify(message)

    def _forget(self) -> None:
        """Begin anew after a step that was slow, but has ended."""
        with self._lock:
            self.message, self.timed_out, self._size = "", False, self._measure()

    def _measure(self) -> int:
        return os.fstat(self._file.fileno()).st_size

    def _run(self) -> None:
        while not self._closed.wait(POLL_SECONDS):
            with suppress(ValueError):  # the file was closed in the meantime
                self.poll()


active: list[StackReport] = []  # at most one
