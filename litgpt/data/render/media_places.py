"""The tokens that stand for an image or a video in a text: places for features of the tower, and texts around them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from litgpt.data.media.errors import MediumError, MissingExtraError
from litgpt.data.media.patches import count_places
from litgpt.data.media.picture_sizes import Size
from litgpt.data.media.pictures import PicturePlan, read_picture_size
from litgpt.data.media.reader import MediaReader, MediumPlan, find_source
from litgpt.data.media.videos import VideoPlan
from litgpt.data.read.conversation import Conversation
from litgpt.data.read.fields import BadRow
from litgpt.data.read.media import MEDIA_KINDS, Medium
from litgpt.data.render.example import Example, PlacedMedium
from litgpt.data.render.object_texts import write_objects
from litgpt.data.tokenizer import Tokenizer
from litgpt.errors import UserError
from litgpt.model.media import Grid
from litgpt.model.vision import check_grids

Plans = Sequence[tuple[Medium, MediumPlan]]


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


class MediaPlacer:
    """Writes out the places of images and videos, for one of which a chat template writes a single token."""

    def __init__(self, reader: MediaReader, tokenizer: Tokenizer) -> None:
        self.media_reader, self.tokenizer, self.shape = reader, tokenizer, reader.shape
        around = (self.shape.start_token, self.shape.end_token)
        names = ("" if token is None else tokenizer.processor.id_to_token(token) for token in around)
        self.start, self.end = (name or "" for name in names)
        video_token = self.shape.image_token if self.shape.video_token is None else self.shape.video_token
        tokens = {"image": self.shape.image_token, "video": video_token}
        texts = {kind: self._build_texts(kind, tokens[kind]) for kind in reader.kinds}
        self.kinds = {kind: each for kind, each in texts.items() if each is not None}
        if "image" not in self.kinds:
            raise UserError(
                f"{tokenizer.folder}: the tokenizer has no token {self.shape.image_token}, which stands for images; "
                "use the model's own tokenizer"
            )
        self._runs: dict[tuple[int, int, Grid], list[int]] = {}

    def _build_texts(self, kind: str, token: int) -> KindTexts | None:
        """The texts of a kind; None if the tokenizer has no token for it."""
        name = self.tokenizer.processor.id_to_token(token)
        if name is None:
            return None
        start, end, around = self.start, self.end, f"{self.start}{name}{self.end}"
        if kind == "video":
            if self.shape.frame_texts is None:
                return KindTexts(token, name, name, name, around)
            # the texts of frames are in the run, which takes the place of the tokens around it too
            mark = self.shape.frame_texts["mark"].format(start=start, token=name, end=end)
            return KindTexts(token, name, mark, name, mark)
        form = self.shape.mark or {"token": "image", "text": "{image}"}
        mark = {"start": start, "image": name}[form["token"]]
        text = around if self.shape.mark is None else mark
        return KindTexts(token, name, mark, form["text"].format(start=start, image=name, end=end), text)

    def write_images(self, ids: np.ndarray, weights: np.ndarray, conversation: Conversation) -> Example:
        """The sample of a conversation, given its (T,) tokens with one a medium; errors as `plan` and `place`."""
        return self.place(ids, weights, self.plan(conversation))

    def plan(self, conversation: Conversation) -> list[tuple[Medium, MediumPlan]]:
        """The media of a conversation with what the tower reads of each, from their headers.

        Raises:
            BadRow: if one cannot be read, or the model does not read its kind.
            MissingExtraError: if a package that reads them is not installed.
        """
        plans = []
        for medium in conversation.media:
            if medium.kind not in self.kinds:
                raise BadRow(f"{medium.kind} data is not supported", "by this model")
            try:
                plan = self.media_reader.plan(medium)
                check_grids(self.shape, self.media_reader.list_grids(plan))
            except MediumError as error:
                raise BadRow(error.reason, str(error)) from None
            except MissingExtraError:
                raise
            except UserError as error:
                raise BadRow(f"{medium.kind} of a size that the model does not read", str(error)) from None
            plans.append((medium, plan))
        return plans

    def write_marks(self, conversation: Conversation) -> Conversation:
        """The conversation with the texts of its objects; marks of media are for the chat template.

        Raises:
            BadRow: if an image cannot be read, or a box is not in it.
        """
        return write_objects(conversation, self.shape.objects, lambda image: self._measure(conversation.images[image]))

    def _measure(self, medium: Medium) -> tuple[Size, Size]:
        """The size of an image, and that it is resized to at first."""
        try:
            return read_picture_size(find_source(medium)), self.media_reader.plan(medium).size
        except MediumError as error:
            raise BadRow(error.reason, str(error)) from None
        except UserError as error:
            raise BadRow("image of a size that the model does not read", str(error)) from None

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
        marked = np.flatnonzero(np.isin(ids, self.shape.media_tokens))
        expected = [self.kinds[medium.kind].token for medium, _ in plans]
        if ids[marked].tolist() != expected:
            names = " and ".join(texts.name for texts in self.kinds.values())
            kind = plans[0][0].kind if plans else "image"
            raise BadRow(f"not one place for each {kind}", f"{len(marked)} {names} for {len(plans)}")
        pieces, media, total, previous = list[np.ndarray](), list[PlacedMedium](), 0, 0
        factors = list[np.ndarray]()
        for token, (medium, plan) in zip(marked.tolist(), plans, strict=True):
            grids = self.media_reader.list_grids(plan)
            run = np.array(self._build_run(medium, plan, grids), np.int32)
            pieces += [ids[previous:token], run]
            factors += [weights[previous:token], np.zeros(len(run), np.float32)]
            total += token - previous
            seconds = plan.seconds if isinstance(plan, VideoPlan) else None
            media.append(PlacedMedium(medium, total, len(run), grids, seconds))
            total, previous = total + len(run), token + 1
        pieces, factors = [*pieces, ids[previous:]], [*factors, weights[previous:]]
        return Example(np.concatenate(pieces), np.concatenate(factors), media=tuple(media))

    def _build_run(self, medium: Medium, plan: MediumPlan, grids: Sequence[Grid]) -> list[int]:
        """The tokens of a medium with the places of each picture of it, all of one size."""
        texts, places = self.shape.tile_texts, count_places(grids[0], self.shape)
        if isinstance(plan, VideoPlan):
            return self._build_frames(self.kinds[medium.kind], plan, places)
        if texts is None:
            return [self.shape.image_token] * (places * len(grids))
        key = (plan.rows, plan.columns, grids[0])
        if key not in self._runs:
            text = self._write_lines(texts, grids[0]) if "line" in texts else self._write_tiles(texts, plan, places)
            self._runs[key] = self.tokenizer.processor.encode(text, add_special_tokens=False).ids
        return self._runs[key]

    def _build_frames(self, texts: KindTexts, plan: VideoPlan, places: int) -> list[int]:
        """The tokens of a video: its places, in steps of frames with their texts if the model has them."""
        forms = self.shape.frame_texts
        if forms is None:
            return [texts.token] * places
        around = {"start": self.start, "end": self.end, "places": texts.name * (places // len(plan.times))}
        times = enumerate(plan.times, 1)
        steps = [forms["step"].format(number=number, seconds=seconds, **around) for number, seconds in times]
        ids: list[int] = self.tokenizer.processor.encode(forms["between"].join(steps), add_special_tokens=False).ids
        return ids

    def _write_lines(self, texts: Mapping[str, str], grid: Grid) -> str:
        lines, columns = (side // self.shape.merge for side in grid[1:])
        line, last = (texts[key].format(places=self.kinds["image"].name * columns) for key in ("line", "last"))
        return line * (lines - 1) + last

    def _write_tiles(self, texts: Mapping[str, str], plan: PicturePlan, places: int) -> str:
        filled = {"places": self.kinds["image"].name * places}
        rows = [
            "".join(texts["tile"].format(row=row, column=column, **filled) for column in range(1, plan.columns + 1))
            for row in range(1, plan.rows + 1)
        ]
        whole = texts["whole" if rows else "single"].format(**filled)
        return "".join(row + texts["row_end"] for row in rows) + whole

    def fingerprint_parts(self) -> list[Any]:
        """Everything that the places depend on besides tokenizer and media, as JSON values."""
        return self.media_reader.fingerprint_parts()
