"""One tokenized sample, and the interface of what renders conversations to samples."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from litgpt.data.read.conversation import Conversation
from litgpt.data.read.fields import BadRow
from litgpt.data.read.media import Medium

if TYPE_CHECKING:
    from litgpt.model.media import Grid


@dataclass(frozen=True)
class PlacedMedium:
    """An image, a video or a sound in a sample.

    Attributes:
        start: the first token that stands for it, and `tokens` their number, with those around its places.
        grids: the size in patches of each image that the tower reads of it, or of the video; of a sound its frames.
        seconds: of a video or a sound, from one step of its frames to the next; None for an image.
    """

    medium: Medium
    start: int
    tokens: int
    grids: "tuple[Grid, ...]"
    seconds: float | None = None

    @property
    def stop(self) -> int:
        """The token after it."""
        return self.start + self.tokens

    @property
    def step_seconds(self) -> list[float]:
        """The seconds of a step of frames for each of `grids`; 1 for images, which have one step."""
        return [1.0 if self.seconds is None else self.seconds] * len(self.grids)


@dataclass(frozen=True)
class Example:
    """One sample.

    Attributes:
        ids: (T,) int32 tokens.
        weights: (T,) float32 factor of the loss of each token; 0 for a token that is not trained.
        channel: the group that the loss is reported in.
        split: number of tokens of the first of two answers, each with its prompt, that are scored as a whole; 0 for a
            sample that is a single document.
        value: a number that belongs to the two answers, such as the margin of a preference.
        media: the images, videos and sounds in it, in order; of two answers, each has its own.
        null_prompt: (U,) int32 tokens of its prompt without the text; None for a sample that is always conditional.
        prompt_tokens: the number of its first tokens that `null_prompt` stands for.
    """

    ids: np.ndarray
    weights: np.ndarray
    channel: str | None = None
    split: int = 0
    value: float = 0.0
    media: tuple[PlacedMedium, ...] = ()
    null_prompt: np.ndarray | None = None
    prompt_tokens: int = 0

    @property
    def documents(self) -> tuple["Example", ...]:
        """The two answers as samples of their own; the sample itself if it is a single document."""
        if not self.split:
            return (self,)
        parts = ((0, self.split), (self.split, len(self.ids)))
        return tuple(self._select(start, stop) for start, stop in parts)

    @property
    def longest(self) -> int:
        """Tokens of its longest document."""
        return max(self.split, len(self.ids) - self.split)

    @property
    def has_targets(self) -> bool:
        """Whether each of its documents has a trained token that another one precedes."""
        return all(bool(document.weights[1:].any()) for document in self.documents)

    def drop_prompt(self) -> "Example":
        """The sample with its null prompt, which is not trained; as it is if it has none."""
        if self.null_prompt is None:
            return self
        ids = np.concatenate([self.null_prompt, self.ids[self.prompt_tokens :]])
        weights = np.concatenate([np.zeros(len(self.null_prompt), np.float32), self.weights[self.prompt_tokens :]])
        return replace(self, ids=ids, weights=weights, media=(), null_prompt=None)

    def take(self, tokens: slice) -> "Example":
        """Take some tokens of each document, and of a medium all or none."""
        if self.split:
            first, second = (document.take(tokens) for document in self.documents)
            empty = Example(np.zeros(1, np.int32), np.zeros(1, np.float32), self.channel)  # which is not trained
            first, second = (document if len(document.ids) else empty for document in (first, second))
            return join_answers(first, second, value=self.value)
        start, stop, _ = tokens.indices(len(self.ids))
        return self._select(*shrink_range(start, stop, self.media))

    def _select(self, start: int, stop: int) -> "Example":
        """The tokens `start` .. `stop`-1 with their media, as a single document."""
        return Example(
            self.ids[start:stop],
            self.weights[start:stop],
            self.channel,
            media=select_media(self.media, start, stop),
        )

    @property
    def is_weighted(self) -> bool:
        """Whether some weights are neither 0 nor 1."""
        return bool(((self.weights != 0) & (self.weights != 1)).any())


def shrink_range(start: int, stop: int, media: Sequence[PlacedMedium]) -> tuple[int, int]:
    """The tokens `start` .. `stop`-1 without those of media that they have only a part of."""
    for medium in media:
        start = medium.stop if medium.start < start < medium.stop else start
        stop = medium.start if medium.start < stop < medium.stop else stop
    return start, max(start, stop)


def select_media(media: Sequence[PlacedMedium], start: int, stop: int) -> tuple[PlacedMedium, ...]:
    """The media among the tokens `start` .. `stop`-1, by their places in these."""
    return tuple(
        replace(medium, start=medium.start - start) for medium in media if start <= medium.start and medium.stop <= stop
    )


def join_answers(first: Example, second: Example, *, value: float = 0.0) -> Example:
    """Join two answers, each with its prompt, to one sample."""
    ids, weights = np.concatenate([first.ids, second.ids]), np.concatenate([first.weights, second.weights])
    moved = (replace(medium, start=medium.start + len(first.ids)) for medium in second.media)
    media = (*first.media, *moved)
    return Example(ids, weights, first.channel, split=len(first.ids), value=value, media=media)


class Renderer(ABC):
    """Renders conversations to samples."""

    has_weights = False
    """Whether it gives parts of an answer their own loss weights."""
    answers_per_sample = 1
    """Number of documents of a sample."""
    reads_media = False
    """Whether samples have images."""

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
