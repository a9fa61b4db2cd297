"""The tokens that stand for an image or a video in a text: its places, in tiles or steps of frames with their texts."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from functools import partial
from typing import Any

from litgpt.data.media.errors import MediumError
from litgpt.data.media.patches import count_places
from litgpt.data.media.picture_sizes import Size
from litgpt.data.media.pictures import PicturePlan, read_picture_size
from litgpt.data.media.reader import MediaReader, MediumPlan
from litgpt.data.media.sources import find_source
from litgpt.data.media.videos import VideoPlan
from litgpt.data.read.conversation import Conversation
from litgpt.data.read.fields import BadRow
from litgpt.data.read.media import MARKS, Medium
from litgpt.data.read.message import Message
from litgpt.data.render.feature_places import FeaturePlacer, KindTexts
from litgpt.data.render.number_words import spell_number
from litgpt.data.render.object_texts import write_objects
from litgpt.data.tokenizer import Tokenizer
from litgpt.errors import UserError
from litgpt.model.media import Grid


class MediaPlacer(FeaturePlacer):
    """Writes out the places of images and videos."""

    def __init__(self, reader: MediaReader, tokenizer: Tokenizer) -> None:
        self.reader, self.shape = reader, reader.shape
        around = (self.shape.start_token, self.shape.end_token)
        names = ("" if token is None else tokenizer.processor.id_to_token(token) for token in around)
        self.start, self.end = (name or "" for name in names)
        self._runs: dict[tuple[int, int, Grid], list[int]] = {}
        super().__init__(reader, tokenizer)

    def _build_texts(self, kind: str) -> KindTexts | None:
        video_token = self.shape.image_token if self.shape.video_token is None else self.shape.video_token
        token = {"image": self.shape.image_token, "video": video_token}[kind]
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
        mark = {"start": start, "image": name}.get(form["token"], form["token"])
        text = around if self.shape.mark is None else mark
        return KindTexts(token, name, mark, form["text"].format(start=start, image=name, end=end), text)

    def write_marks(self, conversation: Conversation) -> Conversation:
        """The conversation with the texts of its objects and around its videos; marks are for the chat template.

        Raises:
            BadRow: if an image or a video cannot be read, or a box is not in its image.
        """
        images = conversation.images
        conversation = write_objects(
            conversation, self.shape.objects, lambda image: self._measure(images[image], images)
        )
        if not {"begin", "end"} & (self.shape.frame_texts or {}).keys():
            return conversation
        write = partial(self._write_around_videos, media=conversation.media)
        return replace(conversation, messages=tuple(map(write, conversation.messages)))

    def _write_around_videos(self, message: Message, media: Sequence[Medium]) -> Message:
        """The message with the texts before and after each of its videos; these join words with the text around."""
        forms, in_order = self.shape.frame_texts or {}, iter(message.media)

        def write(match: re.Match[str]) -> str:
            medium = next(in_order)
            if medium.kind != "video":
                return match[0]
            plan = self.plan_medium(medium, media)
            duration = timedelta(seconds=int(plan.duration))
            begin = forms.get("begin", "").format(frames=spell_number(len(plan.times)), duration=duration)
            return f"{begin}{match[0]}{forms.get('end', '')}"

        return replace(message, content=MARKS.sub(write, message.content)) if message.media else message

    def _measure(self, medium: Medium, media: Sequence[Medium]) -> tuple[Size, Size]:
        """The size of an image, and that it is resized to at first."""
        try:
            return read_picture_size(find_source(medium)), self._plan_medium(medium, media).size
        except MediumError as error:
            raise BadRow(error.reason, str(error)) from None
        except UserError as error:
            raise BadRow("image of a size that the model does not read", str(error)) from None

    def _plan_medium(self, medium: Medium, media: Sequence[Medium]) -> MediumPlan:
        return self.reader.plan(medium, alone=sum(each.kind == "image" for each in media) == 1)

    def _build_run(self, medium: Medium, plan: Any, grids: Sequence[Grid]) -> list[int]:
        texts, places = self.shape.tile_texts, count_places(grids[0], self.shape)
        if (order := self.reader.order(plan)) is not None:
            return [self.kinds[medium.kind].token] * len(order.numbers_MK)
        if medium.kind == "video":
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
        steps = [
            forms["step"].format(
                number=number, seconds=seconds, minutes=int(seconds // 60), rest=int(seconds % 60), **around
            )
            for number, seconds in enumerate(plan.times, 1)
        ]
        ids: list[int] = self.tokenizer.processor.encode(forms["between"].join(steps), add_special_tokens=False).ids
        return ids

    def _write_lines(self, texts: Mapping[str, str], grid: Grid) -> str:
        lines, columns = (side // self.shape.merge for side in grid[1:])
        line, last = (texts[key].format(places=self.kinds["image"].name * columns) for key in ("line", "last"))
        return line * (lines - 1) + last

    def _write_tiles(self, texts: Mapping[str, str], plan: PicturePlan, places: int) -> str:
        filled = {"places": self.kinds["image"].name * places}
        between, columns = texts.get("between", ""), range(1, plan.columns + 1)
        rows = [
            between.join(texts["tile"].format(row=row, column=column, **filled) for column in columns)
            for row in range(1, plan.rows + 1)
        ]
        whole = texts["whole" if rows else "single"].format(**filled)
        return "".join(row + texts["row_end"] for row in rows) + whole
