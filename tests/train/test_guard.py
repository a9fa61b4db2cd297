"""Skipping, spikes, loss scale and signals."""

import hashlib
import os
import random
import signal
import threading
import time
from collections.abc import Iterator

import pytest

from litgpt.errors import UserError
from litgpt.interrupts import (
    SIGNALS,
    exit_on_interrupt,
    is_program,
    notice_interrupt,
    suspend_exit_on_interrupt,
)
from litgpt.recipe.train import GuardArgs
from litgpt.train.guard import Guard, Interrupts, LossScale


@pytest.fixture(autouse=True)
def _default_sigint() -> Iterator[None]:
    """Python's own handler, which it does not install in a background process of a shell."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


def test_the_run_ends_after_so_many_skips_in_a_row() -> None:
    guard = Guard(GuardArgs(max_skipped=3))
    for step in (1, 2):
        assert f"step {step} skipped" in guard.skip(step, loss=float("nan"), gradient_norm=1.0)
    guard.record(3, 1.0)
    for step in (4, 5):
        guard.skip(step, loss=1.0, gradient_norm=float("inf"))
    with pytest.raises(UserError, match=r"guard\.max_skipped: 3"):
        guard.skip(6, loss=float("nan"), gradient_norm=1.0)
    assert guard.skipped == 5


def test_a_spike_is_reported_at_once_and_noise_is_not() -> None:
    noise = random.Random(0)
    guard = Guard(GuardArgs())
    alarms = [guard.record(step, 3 + noise.gauss(0, 0.05)) for step in range(10_000)]
    assert not any(alarms)
    assert "spike" in (guard.record(10_000, 9.0) or "")


def test_a_guard_goes_on_from_its_state() -> None:
    first, second = Guard(GuardArgs()), Guard(GuardArgs())
    for step in range(80):
        first.record(step, 3 + 0.01 * (step % 7))
    first.skip(80, loss=float("nan"), gradient_norm=0.0)
    second.load_state_dict(first.state_dict())
    assert second.state_dict() == first.state_dict()
    assert second.record(81, 9.0) == first.record(81, 9.0) is not None


def test_loss_scale_halves_on_overflow_and_doubles_after_patience() -> None:
    scale = LossScale(active=True, patience=3)
    start = scale.factor
    assert scale.update(finite=False)
    assert scale.factor == start / 2
    for _ in range(3):
        scale.update(finite=True)
    assert scale.factor == start
    scale.factor = 1.0
    assert not scale.update(finite=False)  # nothing left to blame on the scale


def test_without_fp16_the_scale_stays_one() -> None:
    scale = LossScale(active=False)
    assert not scale.update(finite=False)
    assert scale.factor == 1.0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_is_noted_and_the_old_handler_comes_back(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    interrupts = Interrupts()
    with interrupts.handle_signals():
        os.kill(os.getpid(), number)
        assert interrupts.received == number
    assert signal.getsignal(number) == before


def test_a_program_that_has_ended_its_run_ignores_signals_until_it_exits() -> None:
    before = {number: signal.getsignal(number) for number in SIGNALS}
    lines: list[str] = []
    interrupts = Interrupts(lines.append)
    is_program.set()
    try:
        with interrupts.handle_signals():
            interrupts.is_over = True
            for number in SIGNALS * 2:
                os.kill(os.getpid(), number)
        assert {signal.getsignal(number) for number in SIGNALS} == {signal.SIG_IGN}
    finally:
        is_program.clear()
        for number, handler in before.items():
            signal.signal(number, handler)
    assert lines == []


def wait_for_lines(lines: list[str], count: int) -> None:
    until = time.monotonic() + 10
    while len(lines) < count and time.monotonic() < until:
        time.sleep(0.005)


@pytest.mark.parametrize(
    ("number", "again"), [(signal.SIGTERM, "SIGINT"), (signal.SIGINT, "again"), (signal.SIGUSR1, "SIGINT")]
)
def test_a_signal_is_acknowledged_once_and_ctrl_c_after_it_stops_at_once(number: signal.Signals, again: str) -> None:
    lines: list[str] = []
    interrupts = Interrupts(lines.append)
    with interrupts.handle_signals():
        interrupts.activity = "step 3"
        os.kill(os.getpid(), number)
        wait_for_lines(lines, 1)
        if number != signal.SIGINT:  # a scheduler may send it to the group, and torchrun again to each process
            os.kill(os.getpid(), number)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert interrupts.received == number
    assert lines == [f"{number.name}: finishing step 3, then saving; {again} stops at once"]


def test_a_signal_is_acknowledged_during_a_call_that_python_does_not_interrupt() -> None:
    times: list[float] = []
    interrupts = Interrupts(lambda _line: times.append(time.monotonic()))
    with interrupts.handle_signals():
        threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)).start()
        hashlib.pbkdf2_hmac("sha256", b"", b"", 1_500_000)  # releases the lock of the interpreter, as a matmul does
        end = time.monotonic()
    assert interrupts.received == signal.SIGINT
    assert times and times[0] < end - 0.1


def test_ctrl_c_ends_a_process_whose_main_thread_does_not_return(monkeypatch: pytest.MonkeyPatch) -> None:
    messages: list[str] = []
    monkeypatch.setattr("litgpt.interrupts.CLEANUP_SECONDS", 0.05)
    monkeypatch.setattr("litgpt.interrupts.exit_now", messages.append)
    threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt), exit_on_interrupt("interrupted"):
        hashlib.pbkdf2_hmac("sha256", b"", b"", 1_500_000)
    assert messages == ["interrupted"]
    with pytest.raises(KeyboardInterrupt), exit_on_interrupt("interrupted"):
        os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.1)
    assert messages == ["interrupted"]  # the main thread ended by itself


def test_a_command_that_handles_ctrl_c_itself_is_not_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    messages: list[str] = []
    monkeypatch.setattr("litgpt.interrupts.CLEANUP_SECONDS", 0.05)
    monkeypatch.setattr("litgpt.interrupts.exit_now", messages.append)
    with exit_on_interrupt("interrupted"):
        with suspend_exit_on_interrupt(), notice_interrupt() as noticed:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.2)
            assert noticed.is_set() and not messages
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.2)
        assert not messages
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.2)
    assert messages == ["interrupted"]  # outside of the block as before
