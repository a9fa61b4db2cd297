"""Whether a forward pass is the first of its kind, or computes again what backward needs."""

from contextlib import AbstractContextManager
from contextvars import ContextVar, Token

_again: ContextVar[bool] = ContextVar("again", default=False)


def is_recomputing() -> bool:
    """Whether what runs now has run before on the same batch, so that nothing may be counted a second time."""
    return _again.get()


class Recomputing(AbstractContextManager[None]):
    """The time of a second run; may be entered again, since a backward pass in halves computes again for each."""

    def __enter__(self) -> None:
        self.token: Token[bool] = _again.set(True)

    def __exit__(self, *exception: object) -> None:
        _again.reset(self.token)
