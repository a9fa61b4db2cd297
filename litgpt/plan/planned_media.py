"""The images, videos and sounds of the rows of a planned run, for a model with towers that read them."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import cycle
from math import prod
from unittest.mock import patch

import torch
from torch import Tensor

from litgpt.data.media.canvases import order_frames, order_picture
from litgpt.errors import UserError
from litgpt.model import media, vision
from litgpt.model.audio_config import AudioShape
from litgpt.model.config import Config
from litgpt.model.feature_order import FeatureOrder, join_orders
from litgpt.model.media import Grid, Media, Sounds, build_empty_media
from litgpt.model.tower_config import TowerShape
from litgpt.model.tower_flops import EncodedMedia, measure_grids, measure_sounds
from litgpt.recipe.plan import RowMedia
from litgpt.train import step
from litgpt.train.run_spec import RunSpec

DEFAULT_SIDE = 448
"""Height and width in pixels of images for a tower that reads any size."""
DEFAULT_FRAMES = 16
"""Of a video."""
DEFAULT_SECONDS = 30.0
"""Of a sound, for a tower that reads any length."""
FRAMES_PER_SECOND = 100  # of sounds (Radford et al. 2022, Whisper, section 2.2)


@dataclass(frozen=True)
class PlannedPictures:
    """The images and videos of each row, all of one size.

    Attributes:
        shape: of the tower that reads them.
        images, videos: their numbers.
        side: height and width in pixels.
        frames: of each video.
    """

    shape: TowerShape
    images: int
    videos: int
    side: int
    frames: int

    @property
    def grids(self) -> tuple[Grid, ...]:
        """The size of each in patches, images first."""
        side, steps = self.side // self.shape.patch, -(-self.frames // self.shape.temporal)
        return (((1, side, side),) * self.images) + (((steps, side, side),) * self.videos)

    @property
    def orders(self) -> list[FeatureOrder]:
        """The features at the places of each, for videos whose frames have fewer than images; else none."""
        if not self.videos or self.shape.frame_block == 1:
            return []
        steps, side, _ = self.grids[-1]
        return [order_picture(side)] * self.images + [order_frames(steps, side, self.shape.frame_block)] * self.videos

    @property
    def counts(self) -> list[int]:
        """The tokens of each at whose places the decoder reads features."""
        return [sum(order.counts) for order in self.orders] or [
            prod(grid) // self.shape.merge**2 for grid in self.grids
        ]

    @property
    def places(self) -> int:
        """The tokens of a row at whose places the decoder reads features."""
        return sum(self.counts)

    def build_media(self, rows: int, answers: int = 1) -> Media:
        """The media of some rows, without values, each with this number of answers, which share its images."""
        grids, order = self.grids * rows, join_orders(self.orders * rows)
        built = Media(torch.zeros(sum(map(prod, grids)), self.shape.patch_numbers), grids, order=order)
        if answers == 1:
            return built
        uses, of_answers = share_media(len(self.grids), rows, answers)
        return replace(built, uses=uses, answers=of_answers)

    def describe(self) -> dict[str, dict[str, float]]:
        """Number, height and width, and tokens of images and of videos as JSON values."""
        parts = {"images": self.counts[: self.images], "videos": self.counts[self.images :]}
        return {
            name: {
                **{"per_row": len(part), "size": self.side, "tokens_per_row": sum(part)},
                **({"frames": self.frames} if name == "videos" else {}),
            }
            for name, part in parts.items()
            if part
        }

    def list_names(self) -> list[str]:
        """What the plan calls them."""
        size = f"{self.side} x {self.side} pixels"
        images = f"{format_number(self.images, 'image')} of {size}"
        videos = f"{format_number(self.videos, 'video')} of {self.frames} frames of {size}"
        return [name for name, number in ((images, self.images), (videos, self.videos)) if number]


@dataclass(frozen=True)
class PlannedSounds:
    """The sounds of each row, all of one length.

    Attributes:
        shape: of the tower that reads them.
        number: of sounds.
        frames: of each.
    """

    shape: AudioShape
    number: int
    frames: int

    @property
    def places(self) -> int:
        """The tokens of a row at whose places the decoder reads features."""
        return self.number * self.shape.count_features(self.frames)

    @property
    def seconds(self) -> float:
        """Of each."""
        return self.frames / FRAMES_PER_SECOND

    def build_sounds(self, rows: int, answers: int = 1) -> Sounds:
        """The sounds of some rows, without values, each with this number of answers, which share its sounds."""
        lengths = (self.frames,) * (self.number * rows)
        read = self.shape.count_read_frames(self.frames) * len(lengths)
        built = Sounds(torch.zeros(read, self.shape.mels), lengths)
        if answers == 1:
            return built
        uses, of_answers = share_media(self.number, rows, answers)
        return replace(built, uses=uses, answers=of_answers)

    def describe(self) -> dict[str, dict[str, float]]:
        """Number, seconds and tokens as JSON values."""
        sizes = {"per_row": self.number, "seconds": self.seconds, "tokens_per_row": self.places}
        return {"sounds": sizes} if self.number else {}

    def list_names(self) -> list[str]:
        """What the plan calls them."""
        return [f"{format_number(self.number, 'sound')} of {self.seconds:g} seconds"] if self.number else []


@dataclass(frozen=True)
class PlannedMedia:
    """The media of each row, for each tower of the model; None for a tower that it does not have."""

    pictures: PlannedPictures | None
    sounds: PlannedSounds | None

    @property
    def parts(self) -> list[PlannedPictures | PlannedSounds]:
        """Those of each tower, in the order in which a model numbers their features."""
        return [part for part in (self.pictures, self.sounds) if part is not None]

    @property
    def places(self) -> int:
        """The tokens of a row at whose places the decoder reads features."""
        return sum(part.places for part in self.parts)

    def build_media(self, rows: int, answers: int = 1) -> Media:
        """The media of some rows, without values, each with this number of answers, which share its images."""
        built = build_empty_media() if self.pictures is None else self.pictures.build_media(rows, answers)
        if self.sounds is None or not self.sounds.number:
            return built
        return replace(built, sounds=self.sounds.build_sounds(rows, answers))

    def measure(self, rows: int) -> EncodedMedia:
        """The sizes of the media of some rows, of which the operations of the towers are a function."""
        sizes = EncodedMedia()
        if self.pictures is not None:
            sizes = measure_grids(self.pictures.shape, self.pictures.grids * rows)
        if self.sounds is not None:
            sizes = measure_sounds(self.sounds.shape, [self.sounds.frames] * (self.sounds.number * rows), sizes)
        return sizes

    def describe(self) -> dict[str, dict[str, float]]:
        """Numbers, sizes and tokens of each kind as JSON values."""
        return {name: values for part in self.parts for name, values in part.describe().items()}

    def __str__(self) -> str:
        names = [name for part in self.parts for name in part.list_names()]
        return f"{' and '.join(names)}, {self.places} of these tokens"


def share_media(per_row: int, rows: int, answers: int) -> tuple[list[int], list[int]]:
    """The `uses` and `answers` as in `Media` of rows whose answers share their media."""
    of_answers = [range(row * per_row, (row + 1) * per_row) for row in range(rows) for _ in range(answers)]
    uses = [(medium, answer) for answer, media in enumerate(of_answers) for medium in media]
    return [use for use, _ in uses], [answer for _, answer in uses]


def format_number(number: int, noun: str) -> str:
    """A number of things, as in `1 image` and `2 images`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def choose_media(spec: RunSpec, length: int) -> PlannedMedia | None:
    """The media of each row of `length` tokens, as `spec.row_media` asks for them; None without any.

    Raises:
        UserError: for media that the model does not read, of a size that its towers do not read, and for more than fit.
    """
    config, asked = spec.config, spec.row_media
    check_row_media(config, asked)
    pictures = None if config.vision is None else choose_pictures(TowerShape.from_values(config.vision), asked)
    usual = int(asked.seconds is not None or config.vision is None)
    sounds = None if config.audio is None else choose_sounds(AudioShape.from_values(config.audio), asked, usual)
    planned = PlannedMedia(pictures, sounds)
    if planned.places >= length:
        if asked == RowMedia():
            return None  # no row of the run has one
        raise UserError(
            f"{name_counts(planned)} with {planned.places} tokens do not fit into rows of {length}; set a larger "
            "train.max_seq_length"
        )
    return planned if planned.places else None


def name_counts(planned: PlannedMedia) -> str:
    """The settings of the numbers of media that a row has, with their values."""
    return ", ".join(f"{name}_per_row: {values['per_row']}" for name, values in planned.describe().items())


def check_row_media(config: Config, asked: RowMedia) -> None:
    """Check that the model reads what is asked for.

    Raises:
        UserError: naming the setting that has no effect.
    """
    videos = asked.videos or 0
    visual = {"images_per_row": asked.images, "image_size": asked.size}
    visual |= {"videos_per_row": asked.videos, "video_frames": asked.frames}
    heard = {"sounds_per_row": asked.sounds, "sound_seconds": asked.seconds}
    for tower, settings, shape in (("a vision", visual, config.vision), ("an audio", heard, config.audio)):
        for key, value in settings.items():
            if shape is None and value is not None:
                raise UserError(f"{key}: {value} has no effect on a model without {tower} tower; leave it out")
    for key, value, counted, number in (
        ("image_size", asked.size, "images_per_row", videos or (1 if asked.images is None else asked.images)),
        ("video_frames", asked.frames, "videos_per_row", videos),
        ("sound_seconds", asked.seconds, "sounds_per_row", 1 if asked.sounds is None else asked.sounds),
    ):
        if value is not None and not number:
            raise UserError(f"{key}: {value} has no effect with {counted}: 0; set {counted}: 1")


def choose_pictures(shape: TowerShape, asked: RowMedia) -> PlannedPictures:
    """The images and videos of each row.

    Raises:
        UserError: for videos that the tower does not read, and for a size that it does not.
    """
    if asked.videos and shape.video_processor is None:
        raise UserError(f"videos_per_row: {asked.videos} has no effect on a model that reads no videos; leave it out")
    unit = shape.patch * shape.merge
    fixed = shape.image_size if shape.positions == "learned" else None
    usual = fixed or -(-DEFAULT_SIDE // unit) * unit
    if asked.size is not None and (asked.size != fixed if fixed else asked.size % unit):
        cure = f"set {fixed}" if fixed else f"use a multiple of {unit}, such as {usual}"
        raise UserError(f"image_size: {asked.size} is not a size that the vision tower reads; {cure}")
    videos = asked.videos or 0
    images = int(not videos) if asked.images is None else asked.images
    return PlannedPictures(shape, images, videos, asked.size or usual, asked.frames or DEFAULT_FRAMES)


def choose_sounds(shape: AudioShape, asked: RowMedia, usual: int) -> PlannedSounds:
    """The sounds of each row.

    Args:
        usual: their number if it is not given.

    Raises:
        UserError: for a length that the tower does not read.
    """
    longest = shape.most_frames or round(DEFAULT_SECONDS * FRAMES_PER_SECOND)
    frames = longest if asked.seconds is None else round(asked.seconds * FRAMES_PER_SECOND)
    if frames > (shape.most_frames or frames) or shape.count_features(frames) < 1:
        cure = f"set {longest / FRAMES_PER_SECOND:g}"
        raise UserError(f"sound_seconds: {asked.seconds} is not a length that the audio tower reads; {cure}")
    return PlannedSounds(shape, usual if asked.sounds is None else asked.sounds, frames)


@contextmanager
def placed_media(planned: PlannedMedia | None, length: int) -> Iterator[None]:
    """The context in which tokens without values have the places of media.

    Args:
        length: tokens of a row.
    """
    if planned is None:
        yield
        return
    shares = cycle([part.places / length for part in planned.parts])  # the places of each tower are counted in turn

    def count_found(sources_BT: Tensor) -> int:
        return round(next(shares) * sources_BT.numel())

    def select_sources(sources_BT: Tensor) -> Tensor:
        return sources_BT.flatten()[: round(planned.places / length * sources_BT.numel())]

    with (
        patch.object(media, "count_found", count_found),
        patch.object(vision, "select_sources", select_sources),
        patch.object(step, "measure_media", lambda *_: planned.measure(1)),  # also where another rank counts them
    ):
        yield
