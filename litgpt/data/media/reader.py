"""Read the media of samples: their sizes ahead, from headers, and their patches and frames for batches."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from math import prod
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from litgpt.data.media.containers import read_frames, read_video_header
from litgpt.data.media.patches import count_places, cut_patches
from litgpt.data.media.picture_settings import PictureSettings, read_picture_settings
from litgpt.data.media.pictures import (
    PicturePlan,
    normalize_picture,
    open_picture,
    plan_picture,
    read_picture_size,
    resize_picture,
)
from litgpt.data.media.sound_reader import SizedMedium, SoundReader, build_sound_reader
from litgpt.data.media.sources import find_source
from litgpt.data.media.videos import VideoPlan, VideoSettings, plan_video, read_video_settings, resize_frame
from litgpt.data.read.media import Medium
from litgpt.errors import UserError
from litgpt.model.audio_config import AudioShape
from litgpt.model.config import Config
from litgpt.model.feature_order import FeatureOrder
from litgpt.model.media import Grid, Media
from litgpt.model.registry import has_config
from litgpt.model.tower_config import TowerShape
from litgpt.model.vision import check_grids

MediumPlan = PicturePlan | VideoPlan
"""What the tower reads of a medium."""


@dataclass(frozen=True)
class MediaReader:
    """Reads images and videos as the processors of a model do.

    Attributes:
        settings: of the processor of images.
        shape: of the model's tower.
        has_sections: whether the model's tokens have positions of time, row and column.
        videos: the settings of the processor of videos; None for a model that reads none.
        max_video_pixels: the pixels of all decoded frames of a video; None for any number.
        array_names: of the patches of a batch and of their sizes, in its arrays.
        use_names: of the media at the places of its answers, and of these answers, in its arrays.
    """

    settings: PictureSettings
    shape: TowerShape
    has_sections: bool
    videos: VideoSettings | None = None
    max_video_pixels: int | None = None
    array_names: ClassVar[tuple[str, str]] = ("patches", "grids")
    use_names: ClassVar[tuple[str, str]] = ("uses", "image_answers")

    @property
    def media_tokens(self) -> list[int]:
        """The ids of the tokens at whose places the decoder reads features."""
        return self.shape.media_tokens

    @property
    def parts(self) -> "tuple[MediaReader]":
        """The readers of single towers."""
        return (self,)

    def find_part(self, _kind: str) -> "MediaReader":
        """The reader of images and videos."""
        return self

    @property
    def sections_shape(self) -> TowerShape | None:
        """The shape by which tokens have positions of time, row and column; None if they do not."""
        return self.shape if self.has_sections else None

    def fingerprint_parts(self) -> list[Any]:
        """Everything that patches and places depend on besides the media, as JSON values."""
        return [repr(self.settings), self.shape.to_dict(), self.has_sections, repr(self.videos)]

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of media that the model reads."""
        return ("image",) if self.videos is None else ("image", "video")

    def plan(self, medium: Medium, *, alone: bool = True) -> MediumPlan:
        """What the tower reads of a medium, from its header.

        Args:
            alone: whether it is the only image of a sample.

        Raises:
            UserError: if it cannot be read, or the tower does not read its size.
        """
        source = find_source(medium)
        plan: MediumPlan
        if medium.kind == "video":
            plan = plan_video(read_video_header(source), self._video_settings, self.shape)
        else:
            plan = plan_picture(read_picture_size(source), self.settings, self._unit, alone=alone)
        check_grids(self.shape, self.list_grids(plan))
        return plan

    def list_grids(self, plan: MediumPlan) -> tuple[Grid, ...]:
        """The size in patches of each image, or of a video."""
        return plan.list_grids(self.shape.patch)

    def order(self, plan: MediumPlan) -> FeatureOrder | None:
        """The features at the places of a medium; None for all in order."""
        return plan.build_order(self.shape) if self.shape.line_break else None

    def read_order(self, medium: Medium, grids: tuple[Grid, ...], places: int) -> FeatureOrder | None:
        """The same, from the header of the medium.

        Args:
            places: their number when the data was prepared.

        Raises:
            UserError: if it cannot be read, or has another number of places.
        """
        order = self.order(self.plan(medium, alone=is_cut(grids))) if self.shape.line_break else None
        if order is not None and len(order.numbers_MK) != places:
            raise changed_error(medium)
        return order

    def build_blank_order(self, grids: tuple[Grid, ...], places: int) -> FeatureOrder | None:
        """An order of so many places of a medium that cannot be read; None for all in order."""
        if not self.shape.line_break:
            return None
        counts, features = (places, *[0] * (len(grids) - 1)), sum(count_places(grid, self.shape) for grid in grids)
        return FeatureOrder(torch.zeros(places, 1, dtype=torch.int64), None, counts, features)

    def read(self, medium: Medium, grids: tuple[Grid, ...]) -> Tensor:
        """The patches (N, P) of a medium, decoded now.

        Raises:
            UserError: if it cannot be decoded, or has not the size of before.
        """
        is_video = medium.kind == "video"
        parts = self._read_video(medium) if is_video else self._read_image(medium, alone=is_cut(grids))
        cut = [cut_patches(frames, self.shape) for frames in parts]
        if tuple(grid for _, grid in cut) != tuple(grids):
            raise changed_error(medium)
        return torch.cat([patches for patches, _ in cut])

    def read_all(self, media: Sequence[SizedMedium]) -> Iterator[Tensor]:
        """The same of each of some media; errors as `read`."""
        return (self.read(medium, grids) for medium, grids in media)

    def _read_image(self, medium: Medium, *, alone: bool) -> list[Tensor]:
        """The images (1, C, H, W) that the tower reads of one."""
        pictures = resize_picture(open_picture(find_source(medium)), self.settings, self._unit, alone=alone)
        return [normalize_picture(picture, self.settings)[None] for picture in pictures]

    def _read_video(self, medium: Medium) -> list[Tensor]:
        """The frames (F, C, H, W) of a video; each is resized when it is decoded, so that one is in memory whole."""
        settings, source = self._video_settings, find_source(medium)
        header = read_video_header(source)
        plan = plan_video(header, settings, self.shape)
        frames = read_frames(source, header, plan.frames, max_pixels=self.max_video_pixels)
        resized = [resize_frame(frame, plan, settings) for frame in frames]
        return [normalize_picture(torch.stack(resized), settings)]

    def build_blank(self, grids: tuple[Grid, ...]) -> Tensor:
        """Zeros in place of the patches of media."""
        return torch.zeros(sum(map(prod, grids)), self.shape.patch_numbers)

    def pack(self, patches_NP: Tensor, grids: tuple[Grid, ...]) -> Media:
        """The media of the patches of images and videos and their sizes."""
        return Media(patches_NP, grids)

    @property
    def _video_settings(self) -> VideoSettings:
        assert self.videos is not None
        return self.videos

    @property
    def _unit(self) -> int:
        return self.shape.patch * self.shape.merge


def is_cut(grids: tuple[Grid, ...]) -> bool:
    """Whether an image is read as several pictures, as the only one of a sample always is if it depends on that."""
    return len(grids) > 1


def changed_error(medium: Medium) -> UserError:
    """The error for a medium whose places in a text are not those of its file any more."""
    return UserError(f"{medium.name}: not of the size that it had when the data was prepared; restore the file")


@dataclass(frozen=True)
class JointReader:
    """Reads the media of a model with two towers, those of each kind as the reader of its tower does.

    Attributes:
        parts: the readers of single towers.
    """

    parts: tuple[MediaReader, SoundReader]

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of media that the model reads."""
        return tuple(kind for part in self.parts for kind in part.kinds)

    @property
    def media_tokens(self) -> list[int]:
        """The ids of the tokens at whose places the decoder reads features."""
        return [token for part in self.parts for token in part.media_tokens]

    @property
    def sections_shape(self) -> TowerShape | None:
        """As of the reader of images."""
        return self.parts[0].sections_shape

    def find_part(self, kind: str) -> MediaReader | SoundReader:
        """The reader of media of a kind."""
        return next(part for part in self.parts if kind in part.kinds)

    def fingerprint_parts(self) -> list[Any]:
        """Everything that features and places depend on besides the media, as JSON values."""
        return [each for part in self.parts for each in part.fingerprint_parts()]


AnyReader = MediaReader | SoundReader | JointReader


def read_media(reader: AnyReader, media: Sequence[SizedMedium]) -> Iterator[Tensor]:
    """The patches or frames of media, decoded in order, those of the pieces of a long sound in one pass.

    Raises:
        UserError: if one cannot be decoded, or has not the size that it had when the data was prepared.
    """
    for whole, group in groupby(media, key=lambda each: each[0].whole):
        yield from reader.find_part(whole.kind).read_all(list(group))


def open_media_reader(folder: Path) -> AnyReader | None:
    """The reader of the media of the model in a folder; None for a model without a tower.

    Raises:
        UserError: if the processor of the folder is missing or not supported.
    """
    config = Config.from_checkpoint(folder) if has_config(folder) else None
    return None if config is None else build_media_reader(folder, config)


def build_media_reader(folder: Path, config: Config, *, max_video_pixels: int | None = None) -> AnyReader | None:
    """The reader of the media of a model; None for a model without a tower.

    Args:
        folder: of its processors.
        max_video_pixels: as of `MediaReader`.

    Raises:
        UserError: if a processor of the folder is missing or not supported.
    """
    sounds = None if config.audio is None else build_sound_reader(folder, AudioShape.from_values(config.audio))
    if config.vision is None:
        return sounds
    shape, videos, settings = TowerShape.from_values(config.vision), None, read_picture_settings(folder)
    if shape.video_processor is not None:
        is_shared = shape.video_settings == "shared"
        videos = read_video_settings(folder, shape.video_processor, is_shared=is_shared)
    canvases = None if settings.canvases is None else [list(canvas) for canvas in settings.canvases]
    if canvases != shape.canvases:
        raise UserError(
            f"{folder}: image_grid_pinpoints: {canvases} of the processor are not those of config.json; use "
            f"{shape.canvases}"
        )
    images = MediaReader(settings, shape, bool(config.rope_sections), videos, max_video_pixels)
    return images if sounds is None else JointReader((images, sounds))
