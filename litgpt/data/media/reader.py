"""Read the images of samples: their sizes in patches ahead, from headers, and their patches when a batch needs them."""

import base64
import binascii
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from litgpt.data.media.patches import cut_patches
from litgpt.data.media.pictures import (
    PictureError,
    PicturePlan,
    PictureSettings,
    normalize_picture,
    open_picture,
    plan_picture,
    read_picture_settings,
    read_picture_size,
    resize_picture,
)
from litgpt.data.read.media import Medium
from litgpt.errors import UserError
from litgpt.model.config import Config
from litgpt.model.media import Grid
from litgpt.model.registry import has_config
from litgpt.model.tower_config import TowerShape


@dataclass(frozen=True)
class MediaReader:
    """Reads images as the processor of a model does.

    Attributes:
        settings: of the processor.
        shape: of the model's tower.
        has_sections: whether the model's tokens have positions of time, row and column.
    """

    settings: PictureSettings
    shape: TowerShape
    has_sections: bool

    def fingerprint_parts(self) -> list[Any]:
        """Everything that patches and places depend on besides the images, as JSON values."""
        return [repr(self.settings), self.shape.to_dict(), self.has_sections]

    def plan(self, medium: Medium) -> PicturePlan:
        """The images that the tower reads of one, from its header.

        Raises:
            UserError: if it cannot be read, or the tower does not read its size.
        """
        return plan_picture(read_picture_size(find_source(medium)), self.settings, self._unit)

    def list_grids(self, plan: PicturePlan) -> tuple[Grid, ...]:
        """The size in patches of each of them."""
        side = self.shape.patch
        return tuple((1, height // side, width // side) for height, width in plan.pictures)

    def read(self, medium: Medium, grids: tuple[Grid, ...]) -> Tensor:
        """The patches (N, P) of an image, decoded now.

        Raises:
            UserError: if it cannot be decoded, or has not the size of before.
        """
        pictures = resize_picture(open_picture(find_source(medium)), self.settings, self._unit)
        cut = [cut_patches(normalize_picture(picture, self.settings)[None], self.shape) for picture in pictures]
        if tuple(grid for _, grid in cut) != tuple(grids):
            raise UserError(f"{medium.name}: not of the size that it had when the data was prepared; restore the file")
        return torch.cat([patches for patches, _ in cut])

    @property
    def _unit(self) -> int:
        return self.shape.patch * self.shape.merge


def find_source(medium: Medium) -> Path | bytes:
    """The file of an image, or its bytes.

    Raises:
        PictureError: if they are not base64.
    """
    if medium.data is None:
        assert medium.path is not None
        return Path(medium.path)
    try:
        return base64.b64decode(medium.data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise PictureError(medium.name, "not base64", str(error), "encode the bytes of the file") from None


def open_media_reader(folder: Path) -> MediaReader | None:
    """The reader of the images of the model in a folder; None for a model without a vision tower.

    Raises:
        UserError: if the processor of the folder is missing or not supported.
    """
    config = Config.from_checkpoint(folder) if has_config(folder) else None
    if config is None or config.vision is None:
        return None
    shape = TowerShape.from_values(config.vision)
    return MediaReader(read_picture_settings(folder), shape, bool(config.rope_sections))
