"""When Python collects garbage: by itself, or on all ranks at the same steps."""

import gc
from types import TracebackType


class GarbageCollection:
    """Collects garbage at fixed steps inside a `with` block, so that ranks do not pause, and wait, one after the other.

    Args:
        interval: number of optimizer steps between collections; 0 for none; None to leave them to Python.
    """

    def __init__(self, interval: int | None) -> None:
        self.interval, self.was_enabled = interval, False

    def __enter__(self) -> "GarbageCollection":
        if self.interval is not None:
            self.was_enabled = gc.isenabled()
            gc.disable()
        return self

    def collect(self, step: int) -> None:
        """Collect garbage if that is due after a step."""
        if self.interval and step % self.interval == 0:
            gc.collect()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.was_enabled:
            gc.enable()
