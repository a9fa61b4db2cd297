"""The images of the rows of a planned run, for a model with a vision tower."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from unittest.mock import patch

import torch
from torch import Tensor

from litgpt.errors import UserError
from litgpt.model import media, vision
from litgpt.model.config import Config
from litgpt.model.media import Grid, Media, list_features
from litgpt.model.tower_config import TowerShape
from litgpt.model.tower_flops import EncodedMedia, measure_grids
from litgpt.model.transformer_config import TransformerConfig
from litgpt.recipe.plan import RowImages
from litgpt.train import step

DEFAULT_SIDE = 448
"""Height and width in pixels of images for a tower that reads any size."""


@dataclass(frozen=True)
class PlannedImages:
    """The images of each row, all of one size.

    Attributes:
        per_row: their number.
        side: height and width in pixels.
    """

    shape: TowerShape
    per_row: int
    side: int

    @property
    def grid(self) -> Grid:
        """The size of each in patches."""
        return (1, self.side // self.shape.patch, self.side // self.shape.patch)

    @property
    def places(self) -> int:
        """The tokens of a row at whose places the decoder reads features."""
        return self.per_row * self.grid[1] * self.grid[2] // self.shape.merge**2

    def build_media(self, rows: int, answers: int = 1) -> Media:
        """The media of some rows, without values, each with this number of answers, which share its images."""
        numbers, patches = range(self.per_row * rows), self.grid[1] * self.grid[2]
        media = Media(torch.zeros(len(numbers) * patches, self.shape.patch_numbers), (self.grid,) * len(numbers))
        if answers == 1:
            return media
        of_answers = [numbers[row * self.per_row :][: self.per_row] for row in range(rows) for _ in range(answers)]
        uses = [(image, answer) for answer, images in enumerate(of_answers) for image in images]
        return replace(media, uses=[use for use, _ in uses], answers=[answer for _, answer in uses])

    def measure(self, rows: int) -> EncodedMedia:
        """The sizes of the images of some rows, of which the operations of the tower are a function."""
        return measure_grids(self.shape, (self.grid,) * (self.per_row * rows))

    def describe(self) -> dict[str, int]:
        """Number, height and width, and tokens as JSON values."""
        return {"per_row": self.per_row, "size": self.side, "tokens_per_row": self.places}

    def __str__(self) -> str:
        noun = "image" if self.per_row == 1 else "images"
        return f"{self.per_row} {noun} of {self.side} x {self.side} pixels, {self.places} of these tokens"


def choose_images(config: Config, length: int, asked: RowImages) -> PlannedImages | None:
    """The images of each row of `length` tokens; None without any.

    Raises:
        UserError: for a model without a tower, a size that the tower does not read, and more images than fit.
    """
    per_row, side = asked.per_row, asked.size
    if config.vision is None:
        for key, value in (("images_per_row", per_row), ("image_size", side)):
            if value is not None:
                raise UserError(f"{key}: {value} has no effect on a model without a vision tower; leave it out")
        return None
    shape = TowerShape.from_values(config.vision)
    unit = shape.patch * shape.merge
    fixed = (shape.side or 0) * shape.patch if shape.positions == "learned" else None
    usual = fixed or -(-DEFAULT_SIDE // unit) * unit
    if side is not None and (side % unit or side != (fixed or side)):
        cure = f"set {fixed}" if fixed else f"use a multiple of {unit}, such as {usual}"
        raise UserError(f"image_size: {side} is not a size that the vision tower reads; {cure}")
    images = PlannedImages(shape, 1 if per_row is None else per_row, side or usual)
    if images.places >= length:
        if per_row is None and side is None:
            return None  # no row of the run has one
        raise UserError(
            f"images_per_row: {images.per_row} with {images.places} tokens do not fit into rows of {length}; "
            "set a larger train.max_seq_length"
        )
    return images if images.per_row else None


@contextmanager
def placed_images(images: PlannedImages | None, length: int) -> Iterator[None]:
    """The context in which tokens without values have the places of images.

    Args:
        length: tokens of a row.
    """
    if images is None:
        yield
        return
    share = images.places / length

    def select_sources(sources_BT: Tensor) -> Tensor:
        return sources_BT.flatten()[: round(share * sources_BT.numel())]

    def list_image_features(planned: Media, config: TransformerConfig) -> list[tuple[list[int], Tensor, int]]:
        return [each for each in list_features(planned, config) if each[2]]  # none of sounds

    with (
        patch.object(media, "count_found", lambda sources_BT: round(share * sources_BT.numel())),
        patch.object(vision, "select_sources", select_sources),
        patch.object(media, "list_features", list_image_features),
        patch.object(step, "measure_media", lambda *_: images.measure(1)),  # also where another rank counts them
    ):
        yield
