"""Skipped steps, loss spikes, the loss scale and signals."""

import signal
import statistics
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from litgpt.errors import UserError
from litgpt.interrupts import (
    CLEANUP_SECONDS,
    INTERRUPTED,
    SIGNALS,
    exit_now,
    ignore_signals,
    is_program,
    replace_closed_terminals,
    watch_signals,
)
from litgpt.recipe.train import GuardArgs


class Interrupts:
    """Records a signal to save and stop after the step in progress, and announces it at once.

    A second SIGINT ends the process immediately.

    Args:
        announce: prints a line; called in another thread.

    Attributes:
        received: the first signal.
        activity: what is in progress and will be finished.
        outcome: what follows it.
        is_over: the run has ended and is saved, so signals are not announced and stop nothing.
    """

    def __init__(self, announce: Callable[[str], None] = print) -> None:
        self.received: signal.Signals | None = None
        self.activity, self.outcome = "setup", "saving"
        self.is_over = False
        self._announce = announce
        self._announced = False
        self._left = threading.Event()

    @contextmanager
    def handle_signals(self) -> Iterator[None]:
        """Handle the signals inside the block; after it they are ignored in a program, else as they were before."""
        handled = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]  # by nohup
        previous = {number: signal.signal(number, self._record) for number in handled}
        try:
            with watch_signals(self._notice):
                yield
        finally:
            self._left.set()
            if is_program.is_set():
                ignore_signals()
            else:
                for number, handler in previous.items():
                    signal.signal(number, handler)

    def _record(self, number: int, _frame: FrameType | None) -> None:
        replace_closed_terminals()
        if number == signal.SIGINT and self.received is not None and not self.is_over:
            raise KeyboardInterrupt
        self.received = self.received or signal.Signals(number)

    def _notice(self, number: int) -> None:
        """Announce the first signal; end the process if the main thread does not, after another one, SIGINT."""
        if number not in SIGNALS or self.is_over:
            return
        if not self._announced:
            self._announced = True
            replace_closed_terminals()
            repeated = "again" if number == signal.SIGINT else "SIGINT"
            name = signal.Signals(number).name
            self._announce(f"{name}: finishing {self.activity}, then {self.outcome}; {repeated} stops at once")
        elif number == signal.SIGINT and not self._left.wait(CLEANUP_SECONDS):
            exit_now(INTERRUPTED)


class LossScale:
    """A factor on the loss that keeps small fp16 gradients from vanishing (Micikevicius et al. 2018, section 3.2).

    Halved when a gradient overflows, doubled after `patience` steps without one; 1 and constant if not `active`.
    """

    def __init__(self, *, active: bool, patience: int = 2000) -> None:
        self.active, self.patience = active, patience
        self.factor = 2.0**16 if active else 1.0
        self.good = 0

    def update(self, *, finite: bool) -> bool:
        """Update the factor after a step; returns whether the factor explains an overflow."""
        if not self.active:
            return False
        self.good = self.good + 1 if finite else 0
        explained = not finite and self.factor > 1
        if not finite:
            self.factor = max(1.0, self.factor / 2)
        elif self.good == self.patience:
            self.factor, self.good = self.factor * 2, 0
        return explained

    def state_dict(self) -> dict[str, float]:
        """Return the state for a checkpoint."""
        return {"factor": self.factor, "good": self.good}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Restore a state."""
        self.factor, self.good = state["factor"], int(state["good"])


class Guard:
    """Counts steps skipped because loss or gradient was not finite, and reports spikes of the loss."""

    def __init__(self, settings: GuardArgs) -> None:
        self.settings = settings
        self.skipped = 0
        self.in_a_row = 0
        self.losses: deque[float] = deque(maxlen=settings.spike_window)

    def skip(self, step: int, *, loss: float, gradient_norm: float) -> str:
        """Count a skipped step; returns the message.

        Raises:
            UserError: after `guard.max_skipped` consecutive skipped steps.
        """
        self.skipped += 1
        self.in_a_row += 1
        message = (
            f"step {step} skipped: loss {loss:.4g}, gradient norm {gradient_norm:.4g}; weights and moments unchanged"
        )
        if self.in_a_row >= self.settings.max_skipped:
            raise UserError(
                f"{message}; guard.max_skipped: {self.in_a_row} consecutive skipped steps end the run; "
                "try a lower optimizer.lr, or resume from an older checkpoint"
            )
        return message

    def record(self, step: int, loss: float) -> str | None:
        """Record a step's loss; returns a message if it is a spike."""
        self.in_a_row = 0
        spike = None
        if len(self.losses) >= max(2, self.settings.spike_window // 2):
            mean, deviation = statistics.fmean(self.losses), statistics.stdev(self.losses)
            if deviation > 0 and loss > mean + self.settings.spike_sigma * deviation:
                sigmas = (loss - mean) / deviation
                spike = f"step {step}: loss {loss:.4f} is a spike, {sigmas:.1f} standard deviations above the mean"
        self.losses.append(loss)
        return spike

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""
        return {"skipped": self.skipped, "in_a_row": self.in_a_row, "losses": list(self.losses)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state."""
        self.skipped, self.in_a_row = state["skipped"], state["in_a_row"]
        self.losses = deque(state["losses"], maxlen=self.settings.spike_window)
