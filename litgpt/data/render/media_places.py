"""The tokens that stand for an image in a text: places for the features of the tower, and texts around them."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from litgpt.data.media.patches import count_places
from litgpt.data.media.picture_sizes import Size
from litgpt.data.media.pictures import PictureError, PicturePlan, read_picture_size
from litgpt.data.media.reader import MediaReader, find_source
from litgpt.data.read.conversation import Conversation
from litgpt.data.read.fields import BadRow
from litgpt.data.read.media import MARK, Medium
from litgpt.data.render.example import Example, PlacedMedium
from litgpt.data.render.object_texts import write_objects
from litgpt.data.tokenizer import Tokenizer
from litgpt.errors import UserError
from litgpt.model.media import Grid
from litgpt.model.vision import check_grids

Plans = Sequence[tuple[Medium, PicturePlan]]


class MediaPlacer:
    """Writes out the places of images, for one of which a chat template writes a single token."""

    def __init__(self, reader: MediaReader, tokenizer: Tokenizer) -> None:
        self.media_reader, self.tokenizer, self.shape = reader, tokenizer, reader.shape
        self.token = tokenizer.processor.id_to_token(self.shape.image_token)
        if self.token is None:
            raise UserError(
                f"{tokenizer.folder}: the tokenizer has no token {self.shape.image_token}, which stands for images; "
                "use the model's own tokenizer"
            )
        around = (self.shape.start_token, self.shape.end_token)
        names = ("" if token is None else tokenizer.processor.id_to_token(token) for token in around)
        start, end = (name or "" for name in names)
        mark = self.shape.mark or {"token": "image", "text": "{image}"}
        self.mark = {"start": start, "image": str(self.token)}[mark["token"]]
        self.text = f"{start}{self.token}{end}" if self.shape.mark is None else self.mark
        self.marked = mark["text"].format(start=start, image=self.token, end=end)
        self._runs: dict[tuple[int, int, Grid], list[int]] = {}

    def write_images(self, ids: np.ndarray, weights: np.ndarray, conversation: Conversation) -> Example:
        """The sample of a conversation, given its (T,) tokens with one for each image; errors as `plan` and `place`."""
        return self.place(ids, weights, self.plan(conversation))

    def plan(self, conversation: Conversation) -> list[tuple[Medium, PicturePlan]]:
        """The images of a conversation with what the tower reads of each, from their headers.

        Raises:
            BadRow: if one cannot be read.
        """
        plans = []
        for medium in conversation.media:
            if medium.kind != "image":
                raise BadRow(f"{medium.kind} data is not supported", "by this model")
            try:
                plan = self.media_reader.plan(medium)
                check_grids(self.shape, self.media_reader.list_grids(plan))
            except PictureError as error:
                raise BadRow(error.reason, str(error)) from None
            except UserError as error:
                raise BadRow("image of a size that the model does not read", str(error)) from None
            plans.append((medium, plan))
        return plans

    def write_marks(self, conversation: Conversation) -> Conversation:
        """The conversation with the texts of its objects; marks of images are for the chat template.

        Raises:
            BadRow: if an image cannot be read, or a box is not in it.
        """
        return write_objects(conversation, self.shape.objects, lambda image: self._measure(conversation.images[image]))

    def _measure(self, medium: Medium) -> tuple[Size, Size]:
        """The size of an image, and that it is resized to at first."""
        try:
            return read_picture_size(find_source(medium)), self.media_reader.plan(medium).size
        except PictureError as error:
            raise BadRow(error.reason, str(error)) from None
        except UserError as error:
            raise BadRow("image of a size that the model does not read", str(error)) from None

    def write_places(self, text: str) -> str:
        """A rendered text with the token of images where a template that takes only texts has left marks.

        The token that templates write for an image has the texts around it.
        """
        return text.replace(MARK, self.text).replace(self.mark, self.marked)

    def place(self, ids: np.ndarray, weights: np.ndarray, plans: Plans) -> Example:
        """A sample with the places of all images written out; they are not trained.

        Args:
            ids: (T,) tokens with one token for each image.

        Raises:
            BadRow: if the text has more or fewer of these tokens than images.
        """
        marked = np.flatnonzero(np.isin(ids, self.shape.media_tokens))
        if len(marked) != len(plans) or (ids[marked] != self.shape.image_token).any():
            raise BadRow("not one place for each image", f"{len(marked)} {self.token} for {len(plans)} images")
        pieces, media, total, previous = list[np.ndarray](), list[PlacedMedium](), 0, 0
        factors = list[np.ndarray]()
        for token, (medium, plan) in zip(marked.tolist(), plans, strict=True):
            grids = self.media_reader.list_grids(plan)
            run = np.array(self._build_run(plan, grids), np.int32)
            pieces += [ids[previous:token], run]
            factors += [weights[previous:token], np.zeros(len(run), np.float32)]
            total += token - previous
            media.append(PlacedMedium(medium, total, len(run), grids))
            total, previous = total + len(run), token + 1
        pieces, factors = [*pieces, ids[previous:]], [*factors, weights[previous:]]
        return Example(np.concatenate(pieces), np.concatenate(factors), media=tuple(media))

    def _build_run(self, plan: PicturePlan, grids: Sequence[Grid]) -> list[int]:
        """The tokens of an image with the places of each picture of it, all of one size."""
        texts, places = self.shape.tile_texts, count_places(grids[0], self.shape)
        if texts is None:
            return [self.shape.image_token] * (places * len(grids))
        key = (plan.rows, plan.columns, grids[0])
        if key not in self._runs:
            text = self._write_lines(texts, grids[0]) if "line" in texts else self._write_tiles(texts, plan, places)
            self._runs[key] = self.tokenizer.processor.encode(text, add_special_tokens=False).ids
        return self._runs[key]

    def _write_lines(self, texts: Mapping[str, str], grid: Grid) -> str:
        lines, columns = (side // self.shape.merge for side in grid[1:])
        line, last = (texts[key].format(places=str(self.token) * columns) for key in ("line", "last"))
        return line * (lines - 1) + last

    def _write_tiles(self, texts: Mapping[str, str], plan: PicturePlan, places: int) -> str:
        filled = {"places": str(self.token) * places}
        rows = [
            "".join(texts["tile"].format(row=row, column=column, **filled) for column in range(1, plan.columns + 1))
            for row in range(1, plan.rows + 1)
        ]
        whole = texts["whole" if rows else "single"].format(**filled)
        return "".join(row + texts["row_end"] for row in rows) + whole

    def fingerprint_parts(self) -> list[Any]:
        """Everything that the places depend on besides tokenizer and images, as JSON values."""
        return self.media_reader.fingerprint_parts()
