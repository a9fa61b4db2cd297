"""Signals that are noticed at once, also while the main thread is in a long call that Python does not interrupt."""

import errno
import os
import signal
import socket
import termios
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

EXIT_CODE = 130  # 128 + SIGINT, as shells have it
INTERRUPTED = "litgpt: interrupted"
CLEANUP_SECONDS = 1.0  # seconds that the main thread has to clean up after Ctrl-C
SHOW_CURSOR = "\x1b[?25h"
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
is_program = threading.Event()
"""Set in a process that is the program `litgpt`, which ends when its command returns."""


@contextmanager
def watch_signals(notice: Callable[[int], None]) -> Iterator[None]:
    """Call `notice` in a thread with the number of every signal that Python handles, as soon as it arrives.

    Python's own handlers run between two instructions of the main thread: not during a backward pass, a collective or
    the training of a tokenizer. In other threads than the main one, the block is not watched.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    receiver, sender = socket.socketpair()
    sender.setblocking(False)

    def read_signals() -> None:
        while numbers := receiver.recv(64):
            for number in numbers:
                notice(number)

    thread = threading.Thread(target=read_signals, name="signals", daemon=True)
    thread.start()
    previous = signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(previous)
        sender.close()


@contextmanager
def exit_on_interrupt(message: str) -> Iterator[None]:
    """End the process if the main thread does not leave the block within `CLEANUP_SECONDS` of Ctrl-C.

    Args:
        message: printed in that case; empty for none.
    """
    left = threading.Event()

    def notice(number: int) -> None:
        if number == signal.SIGINT and not left.wait(CLEANUP_SECONDS):
            exit_now(message)

    with watch_signals(notice):
        try:
            yield
        finally:
            left.set()


@contextmanager
def suspend_exit_on_interrupt() -> Iterator[None]:
    """Inside the block the process does not end after Ctrl-C, which a command handles itself."""
    previous = signal.set_wakeup_fd(-1)
    try:
        yield
    finally:
        signal.set_wakeup_fd(previous, warn_on_full_buffer=False)


@contextmanager
def notice_interrupt() -> Iterator[threading.Event]:
    """Yield an event that the first Ctrl-C inside the block sets; another one raises KeyboardInterrupt."""
    noticed = threading.Event()

    def handle(_number: int, _frame: FrameType | None) -> None:
        if noticed.is_set():
            raise KeyboardInterrupt
        noticed.set()

    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield noticed
    finally:
        signal.signal(signal.SIGINT, previous)


def ignore_signals() -> None:
    """Ignore the signals that ask a process to end, because it has nothing left to do but exit."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def replace_closed_terminals() -> None:
    """Send output to nowhere if its terminal was closed, so that printing does not end a run that will be saved."""
    for output in (1, 2):
        try:
            termios.tcgetattr(output)
        except termios.error as error:
            if error.args[0] == errno.EIO:  # a file or a pipe has another error
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, output)
                os.close(nowhere)


def exit_now(message: str = "") -> None:
    """End the process without cleaning up.

    Args:
        message: printed to stderr; empty for none.
    """
    if message:
        cursor = SHOW_CURSOR if os.isatty(2) else ""  # which a progress line hides
        os.write(2, f"{cursor}{message}\n".encode())  # not sys.stderr, in whose lock the main thread may be
    os._exit(EXIT_CODE)
