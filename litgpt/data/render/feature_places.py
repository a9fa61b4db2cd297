"""The tokens that stand for media in a text: places for features of a tower, and texts around them."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from litgpt.data.media.errors import MediumError, MissingExtraError
from litgpt.data.media.reader import AnyReader
from litgpt.data.read.conversation import Conversation
from litgpt.data.read.fields import BadRow
from litgpt.data.read.media import MEDIA_KINDS, Medium
from litgpt.data.render.example import Example, PlacedMedium
from litgpt.data.tokenizer import Tokenizer
from litgpt.errors import UserError
from litgpt.model.media import Grid

Plans = Sequence[tuple[Medium, Any]]
"""Media with what the reader of the model plans for each."""


@dataclass(frozen=True)
class KindTexts:
    """What a text has for a medium of one kind.

    Attributes:
        token: the id of the token at whose places features are, and `name` its text.
        mark: what chat templates write for one, and `marked` what stands for it then: its token, and texts around it.
        text: what stands for one where a template that takes only texts has left a mark.
    """

    token: int
    name: str
    mark: str
    marked: str
    text: str


class FeaturePlacer(ABC):
    """Writes out the places of media, for one of which a chat template writes a single token.

    Attributes:
        media_reader: of the media.
        kinds: what texts have for each kind that model and tokenizer have a token for.

    Raises:
        UserError: if the tokenizer has no token for the first kind that the model reads.
    """

    def __init__(self, reader: AnyReader, tokenizer: Tokenizer) -> None:
        self.media_reader, self.tokenizer = reader, tokenizer
        texts = {kind: self._build_texts(kind) for kind in reader.kinds}
        self.kinds = {kind: each for kind, each in texts.items() if each is not None}
        if (first := reader.kinds[0]) not in self.kinds:
            raise UserError(
                f"{tokenizer.folder}: the tokenizer has no token {reader.media_tokens[0]}, which stands for "
                f"{MEDIA_KINDS[first].columns[0]}; use the model's own tokenizer"
            )

    @abstractmethod
    def _build_texts(self, kind: str) -> KindTexts | None:
        """The texts of a kind; None if the tokenizer has no token for it."""

    @abstractmethod
    def _build_run(self, medium: Medium, plan: Any, grids: Sequence[Grid]) -> list[int]:
        """The tokens of a medium, given what `media_reader` plans for it."""

    def write_images(self, ids: np.ndarray, weights: np.ndarray, conversation: Conversation) -> Example:
        """The sample of a conversation, given its (T,) tokens with one a medium; errors as `plan` and `place`."""
        return self.place(ids, weights, self.plan(conversation))

    def plan(self, conversation: Conversation) -> list[tuple[Medium, Any]]:
        """The media of a conversation with what the tower reads of each, from their headers.

        Raises:
            BadRow: if one cannot be read, or the model does not read its kind.
            MissingExtraError: if a package that reads them is not installed.
        """
        return [(medium, self.plan_medium(medium, conversation.media)) for medium in conversation.media]

    def plan_medium(self, medium: Medium, media: Sequence[Medium]) -> Any:
        """What the tower reads of a medium, one of those of a conversation; errors as `plan`."""
        if medium.kind not in self.kinds:
            raise BadRow(f"{medium.kind} data is not supported", "by this model")
        try:
            return self._plan_medium(medium, media)
        except MediumError as error:
            raise BadRow(error.reason, str(error)) from None
        except MissingExtraError:
            raise
        except UserError as error:
            raise BadRow(f"{medium.kind} of a size that the model does not read", str(error)) from None

    def _plan_medium(self, medium: Medium, _media: Sequence[Medium]) -> Any:
        """What the tower reads of a medium, as its reader says."""
        return self.media_reader.find_part(medium.kind).plan(medium)

    @abstractmethod
    def write_marks(self, conversation: Conversation) -> Conversation:
        """The conversation with the texts of its objects; marks of media are for the chat template.

        Raises:
            BadRow: if objects cannot be written.
        """

    def write_places(self, text: str) -> str:
        """A rendered text with the tokens of media where a template that takes only texts has left marks.

        The token that templates write for a medium has the texts around it.
        """
        for kind, texts in self.kinds.items():
            text = text.replace(MEDIA_KINDS[kind].mark, texts.text).replace(texts.mark, texts.marked)
        return text

    def place(self, ids: np.ndarray, weights: np.ndarray, plans: Plans) -> Example:
        """A sample with the places of all media written out; they are not trained.

        Args:
            ids: (T,) tokens with one token for each medium.

        Raises:
            BadRow: if the text has more or fewer of these tokens than media, or in another order.
        """
        marked = np.flatnonzero(np.isin(ids, self.media_reader.media_tokens))
        expected = [self.kinds[medium.kind].token for medium, _ in plans]
        if ids[marked].tolist() != expected:
            names = " and ".join(texts.name for texts in self.kinds.values())
            kind = plans[0][0].kind if plans else next(iter(self.kinds))
            raise BadRow(f"not one place for each {kind}", f"{len(marked)} {names} for {len(plans)}")
        pieces, media, total, previous = list[np.ndarray](), list[PlacedMedium](), 0, 0
        factors = list[np.ndarray]()
        for token, (medium, plan) in zip(marked.tolist(), plans, strict=True):
            run, placed = self._write_run(medium, plan)
            pieces += [ids[previous:token], np.array(run, np.int32)]
            factors += [weights[previous:token], np.zeros(len(run), np.float32)]
            total += token - previous
            media += [replace(each, start=total) for each in placed]
            total, previous = total + len(run), token + 1
        pieces, factors = [*pieces, ids[previous:]], [*factors, weights[previous:]]
        return Example(np.concatenate(pieces), np.concatenate(factors), media=tuple(media))

    def _write_run(self, medium: Medium, plan: Any) -> tuple[list[int], list[PlacedMedium]]:
        """The tokens of a medium, and what is placed among them, in a text that they begin."""
        grids = self.media_reader.find_part(medium.kind).list_grids(plan)
        run = self._build_run(medium, plan, grids)
        return run, [PlacedMedium(medium, 0, len(run), grids, plan.seconds)]

    def fingerprint_parts(self) -> list[Any]:
        """Everything that the places depend on besides tokenizer and media, as JSON values."""
        return self.media_reader.fingerprint_parts()
