"""Whether a forward pass is the first of its kind, or computes again what backward needs."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_again: ContextVar[bool] = ContextVar("again", default=False)


def is_recomputing() -> bool:
    """Whether what runs now has run before on the same batch, so that nothing may be counted a second time."""
    return _again.get()


@contextmanager
def recomputing() -> Iterator[None]:
    """The time of a second run."""
    token = _again.set(True)
    try:
        yield
    finally:
        _again.reset(token)
