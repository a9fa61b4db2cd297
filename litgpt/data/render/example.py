"""One tokenized sample, and the interface of what renders conversations to samples."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from litgpt.data.read.conversation import Conversation
from litgpt.data.read.fields import BadRow


@dataclass(frozen=True)
class Example:
    """One sample.

    Attributes:
        ids: (T,) int32 tokens.
        weights: (T,) float32 factor of the loss of each token; 0 for a token that is not trained.
        channel: the group that the loss is reported in.
    """

    ids: np.ndarray
    weights: np.ndarray
    channel: str | None = None

    @property
    def is_weighted(self) -> bool:
        """Whether some weights are neither 0 nor 1."""
        return bool(((self.weights != 0) & (self.weights != 1)).any())


class Renderer(Protocol):
    """Renders conversations to samples."""

    def build_examples(self, conversations: Sequence[Conversation]) -> list[Example | BadRow]:
        """Tokenize each conversation; a BadRow for one that cannot be rendered."""

    def encode_prompt(self, conversation: Conversation) -> list[int]:
        """Tokens of the prompt of the conversation's first answer; empty without a prompt."""

    def fingerprint_parts(self) -> list[Any]:
        """Everything that the samples depend on besides the conversations, as JSON values; part of cache keys."""

    @property
    def has_weights(self) -> bool:
        """Whether it gives parts of an answer their own loss weights."""
