"""Skipping, spikes, loss scale and signals."""

import os
import random
import signal

import pytest

from litgpt.errors import UserError
from litgpt.recipe.train import GuardArgs
from litgpt.train.guard import Guard, Interrupts, LossScale


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


def test_a_second_ctrl_c_stops_at_once() -> None:
    interrupts = Interrupts()
    with interrupts.handle_signals():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
