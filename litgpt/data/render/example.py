"""One tokenized sample, and the interface of what renders conversations to samples."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

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


class Renderer(ABC):
    """Renders conversations to samples."""

    has_weights = False
    """Whether it gives parts of an answer their own loss weights."""

    @abstractmethod
    def render(self, conversation: Conversation) -> Any:
        """Render a conversation as text.

        Raises:
            BadRow: if that is impossible.
        """

    def try_render(self, conversation: Conversation) -> Any:
        """Render a conversation; returns the BadRow if that is impossible."""
        try:
            return self.render(conversation)
        except BadRow as error:
            return error

    @abstractmethod
    def build_examples(self, conversations: Sequence[Conversation]) -> list[Example | BadRow]:
        """Tokenize each conversation; a BadRow for one that cannot be rendered."""

    @abstractmethod
    def list_unread(self, conversation: Conversation) -> list[str]:
        """List the names of the fields of messages and calls that the samples do not depend on."""

    @abstractmethod
    def encode_prompt(self, conversation: Conversation) -> list[int]:
        """Tokens of the prompt of the conversation's first answer; empty without a prompt."""

    @abstractmethod
    def fingerprint_parts(self) -> list[Any]:
        """Everything that the samples depend on besides the conversations, as JSON values; part of cache keys."""
