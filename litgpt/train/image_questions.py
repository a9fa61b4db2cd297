"""Questions about images of the data, which a run answers at each validation."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np

from litgpt.data.preview_page import build_thumbnail
from litgpt.data.render.example import Example, PlacedMedium, select_media
from litgpt.data.stream.batch import Batch, collate_rows, to_batch
from litgpt.data.stream.batch_media import MediaLoader
from litgpt.data.stream.samples import SampleRows
from litgpt.errors import UserError

QUESTIONS = 4
MAX_SEARCHED = 10_000
"""Samples among which those with images are looked for."""


@dataclass(frozen=True)
class ImageQuestion:
    """A prompt with images, and the answer in the data.

    Attributes:
        ids: tokens of the prompt.
        target: tokens of the answer.
        media: the images in the prompt.
        loader: decodes them.
    """

    ids: list[int]
    target: list[int]
    media: tuple[PlacedMedium, ...]
    loader: MediaLoader

    @property
    def name(self) -> str:
        """The names of its images."""
        return ", ".join(Path(placed.medium.name).name for placed in self.media)

    @property
    def text_ids(self) -> list[int]:
        """The tokens of the prompt that do not stand for an image."""
        places = {place for placed in self.media for place in range(placed.start, placed.stop)}
        return [token for place, token in enumerate(self.ids) if place not in places]

    def load(self) -> Batch:
        """The prompt as a batch of one row, (1, T), with its images, which are decoded now.

        Raises:
            UserError: if one cannot be read any more, under `data.on_error: raise`.
        """
        example = Example(np.array(self.ids, np.int32), np.zeros(len(self.ids), np.float32), media=self.media)
        rows, media = self.loader.load([[example]])
        arrays = collate_rows(rows, padding=True, weighted=False, channels=())
        return to_batch(arrays | media | self.loader.build_positions(rows, arrays, padding=True))

    def draw_thumbnails(self) -> list[str]:
        """Small images as data URIs; an image that cannot be read is left out."""
        drawn = (build_thumbnail(placed.medium) for placed in self.media)
        return [each["thumbnail"] for each in drawn if "thumbnail" in each]


def list_image_questions(
    rows: Any, which: Literal["first", "random"] | int, seed: int, count: int = QUESTIONS
) -> tuple[ImageQuestion, ...]:
    """Questions from the rows of a stream; none if these are not samples with images.

    Args:
        which: the sample to begin with, as `eval.evaluate_example`.

    Raises:
        UserError: if there are not as many samples.
    """
    if not isinstance(rows, SampleRows) or rows.media is None:
        return ()
    samples = len(rows.samples.table)
    start = {"first": 0, "random": random.Random(seed).randrange(samples)}.get(str(which), which)
    if not 0 <= int(start) < samples:
        raise UserError(f"eval.evaluate_example: {which} of {samples} samples with images; use 0 to {samples - 1}")
    return tuple(islice(_iter_questions(rows, rows.media, int(start)), count))


def _iter_questions(rows: SampleRows, loader: MediaLoader, start: int) -> Iterator[ImageQuestion]:
    samples = len(rows.samples.table)
    for offset in range(min(samples, MAX_SEARCHED)):
        example = rows.samples.read((start + offset) % samples)
        is_trained = example.weights > 0
        first = int(is_trained.argmax())
        media = select_media(example.media, 0, first)
        if media:
            after = np.flatnonzero(~is_trained[first:])
            stop = first + int(after[0]) if len(after) else len(is_trained)
            yield ImageQuestion(example.ids[:first].tolist(), example.ids[first:stop].tolist(), media, loader)
