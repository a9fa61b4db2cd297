"""The tokens that an image is in a text, as codes."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from litgpt.data.media.codes import CodeReader
from litgpt.data.media.errors import MediumError
from litgpt.data.read.conversation import Conversation
from litgpt.data.read.fields import BadRow
from litgpt.data.read.media import MARK, Medium
from litgpt.data.render.example import Example, PlacedMedium

CodeRuns = Sequence[tuple[Medium, list[int]]]


class CodePlacer:
    """Writes out the codes of images, for one of which a text has the token that begins it."""

    media_reader = None
    """No features are read: images are tokens."""

    def __init__(self, reader: CodeReader) -> None:
        self.reader = reader

    def write_marks(self, conversation: Conversation) -> Conversation:
        """The conversation with the token of an image in place of each mark, which a chat template writes as text.

        Raises:
            BadRow: if it has boxes.
        """
        if conversation.objects is not None:
            raise BadRow("boxes are not supported", "by a model that reads images as codes")
        messages = (
            replace(message, content=message.content.replace(MARK, self.reader.begin)) if message.media else message
            for message in conversation.messages
        )
        return replace(conversation, messages=tuple(messages))

    def write_places(self, text: str) -> str:
        """A rendered text with the token of an image in place of each mark."""
        return text.replace(MARK, self.reader.begin)

    def write_images(self, ids: np.ndarray, weights: np.ndarray, conversation: Conversation) -> Example:
        """The sample of a conversation, given its (T,) tokens with one for each image; errors as `plan` and `place`."""
        return self.place(ids, weights, self.plan(conversation))

    def plan(self, conversation: Conversation) -> list[tuple[Medium, list[int]]]:
        """The images of a conversation with the tokens of each.

        Raises:
            BadRow: if one cannot be read, or is no image.
        """
        for kind in (medium.kind for medium in conversation.media if medium.kind != "image"):
            raise BadRow(f"{kind} data is not supported", "by a model that writes images")
        try:
            return [(medium, self.reader.read(medium)) for medium in conversation.media]
        except MediumError as error:
            raise BadRow(error.reason, str(error)) from None

    def place(self, ids: np.ndarray, weights: np.ndarray, plans: CodeRuns) -> Example:
        """A sample with all images written out; each is trained as the token that stands for it.

        Args:
            ids: (T,) tokens with one token for each image.

        Raises:
            BadRow: if the text has more or fewer of these tokens than images.
        """
        marked = np.flatnonzero(self.reader.tokens.is_image(ids))
        if len(marked) != len(plans) or (ids[marked] != self.reader.tokens.begin).any():
            raise BadRow("not one place for each image", f"{len(marked)} image tokens for {len(plans)} images")
        runs = [[int(token)] for token in ids]
        for token, (_, run) in zip(marked.tolist(), plans, strict=True):
            runs[token] = run
        lengths = np.array([len(run) for run in runs], np.int64)
        starts = np.cumsum(lengths) - lengths
        # without their bytes: a sample needs only to know which tokens are an image, which no cut divides
        media = tuple(
            PlacedMedium(replace(medium, path=medium.path or medium.name, data=None), int(starts[token]), len(run), ())
            for token, (medium, run) in zip(marked.tolist(), plans, strict=True)
        )
        tokens = np.array([token for run in runs for token in run], np.int32)
        return Example(tokens, np.repeat(weights, lengths), media=media)

    def fingerprint_parts(self) -> list[Any]:
        """Everything that the samples depend on besides tokenizer and images, as JSON values."""
        return self.reader.fingerprint_parts()
