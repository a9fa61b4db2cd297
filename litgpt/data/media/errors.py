"""Errors of images, videos and sounds that cannot be read."""

from litgpt.errors import UserError


class MediumError(UserError):
    """An image, a video or a sound that cannot be read.

    Attributes:
        reason: a few words, the same for all with this fault, for counting.
    """

    def __init__(self, name: str, reason: str, detail: str, cure: str) -> None:
        super().__init__(f"{name}: {reason} ({detail}); {cure}")
        self.reason = reason


class MissingExtraError(UserError):
    """A package that videos or sounds need, which is not installed: a fault of the run, not of one row."""
