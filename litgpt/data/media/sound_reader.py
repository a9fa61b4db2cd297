"""Read the sounds of samples: their numbers of frames ahead, and their frames when a batch needs them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from litgpt.data.media.sounds import (
    SoundSettings,
    compute_log_mel,
    decode_pieces,
    read_sound_samples,
    read_sound_settings,
)
from litgpt.data.media.sources import find_source
from litgpt.data.read.media import Medium
from litgpt.errors import UserError
from litgpt.model.audio import check_lengths
from litgpt.model.audio_config import AudioShape
from litgpt.model.feature_order import FeatureOrder
from litgpt.model.media import Grid, Media, pack_sounds

SizedMedium = tuple[Medium, tuple[Grid, ...]]
"""A medium with the sizes that the data was prepared with."""


@dataclass(frozen=True)
class SoundPlan:
    """What the tower reads of a sound.

    Attributes:
        frames: their number.
        seconds: from one to the next.
    """

    frames: int
    seconds: float


@dataclass(frozen=True)
class SoundReader:
    """Reads sounds as the processor of a model does; the size of one is its number of frames, one row and one column.

    Attributes:
        settings: of the processor.
        shape: of the model's tower.
        array_names: of the frames of a batch and of their numbers, in its arrays.
        use_names: of the sounds at the places of its answers, and of these answers, in its arrays.
    """

    settings: SoundSettings
    shape: AudioShape
    kinds: ClassVar[tuple[str, ...]] = ("audio",)
    sections_shape: ClassVar[None] = None
    array_names: ClassVar[tuple[str, str]] = ("frames", "lengths")
    use_names: ClassVar[tuple[str, str]] = ("sound_uses", "sound_answers")

    @property
    def media_tokens(self) -> list[int]:
        """The ids of the tokens at whose places the decoder reads features."""
        return self.shape.media_tokens

    @property
    def parts(self) -> "tuple[SoundReader]":
        """The readers of single towers."""
        return (self,)

    def find_part(self, _kind: str) -> "SoundReader":
        """The reader of sounds."""
        return self

    def fingerprint_parts(self) -> list[Any]:
        """Everything that frames and places depend on besides the sounds, as JSON values."""
        return [repr(self.settings), self.shape.to_dict()]

    def plan(self, medium: Medium) -> SoundPlan:
        """What the tower reads of a sound.

        Raises:
            UserError: if it cannot be read, or the tower does not read its length.
        """
        if medium.stop is None:
            samples = read_sound_samples(find_source(medium), self.settings, is_track=medium.has_track)
        else:
            samples = medium.stop - medium.start
        frames = self.settings.count_frames(samples)
        check_lengths(self.shape, (frames,))
        return SoundPlan(frames, self.settings.hop / self.settings.rate)

    def list_grids(self, plan: SoundPlan) -> tuple[Grid, ...]:
        """The number of frames."""
        return ((plan.frames, 1, 1),)

    def read(self, medium: Medium, grids: tuple[Grid, ...]) -> Tensor:
        """The frames (N, mels) of a sound that the tower reads, decoded now; errors as `read_all`."""
        return next(self.read_all([(medium, grids)]))

    def read_all(self, media: Sequence[SizedMedium]) -> Iterator[Tensor]:
        """The same of each of some sounds from one file; consecutive pieces are decoded in one pass.

        Raises:
            UserError: if one cannot be decoded, or has not the length of before.
        """
        for pieces in split_ascending(media):
            source = find_source(pieces[0][0])
            decoded = decode_pieces(source, self.settings, [medium.samples for medium, _ in pieces])
            for (medium, grids), samples in zip(pieces, decoded, strict=True):
                yield self._compute_frames(medium, grids, samples)

    def _compute_frames(self, medium: Medium, grids: tuple[Grid, ...], samples: Tensor) -> Tensor:
        frames = self.settings.count_frames(len(samples))
        if ((frames, 1, 1),) != tuple(grids):
            raise UserError(f"{medium.name}: not of the length that it had when the data was prepared; restore it")
        return compute_log_mel(samples, self.settings)[: self.shape.count_read_frames(frames)]

    def read_order(self, _medium: Medium, _grids: tuple[Grid, ...], _places: int) -> FeatureOrder | None:
        """None: the features of a sound are at its places in order."""
        return None

    def build_blank_order(self, _grids: tuple[Grid, ...], _places: int) -> FeatureOrder | None:
        """None, as for one that can be read."""
        return None

    def build_blank(self, grids: tuple[Grid, ...]) -> Tensor:
        """Zeros in place of the frames of sounds."""
        return torch.zeros(sum(self.shape.count_read_frames(frames) for frames, _, _ in grids), self.shape.mels)

    def pack(self, frames_NM: Tensor, grids: tuple[Grid, ...]) -> Media:
        """The media of the frames of sounds and their numbers."""
        return pack_sounds(frames_NM, tuple(frames for frames, _, _ in grids))


def split_ascending(media: Sequence[SizedMedium]) -> list[list[SizedMedium]]:
    """Sounds from one file in lists, in each of which every piece begins at the end of the one before it, or later."""
    lists = list[list[SizedMedium]]()
    for medium, grids in media:
        before = lists[-1][-1][0].stop if lists else None
        if before is not None and medium.stop is not None and before <= medium.start:
            lists[-1].append((medium, grids))
        else:
            lists.append([(medium, grids)])
    return lists


def build_sound_reader(folder: Path, shape: AudioShape) -> SoundReader:
    """The reader of the sounds of a model.

    Args:
        folder: of its processor.

    Raises:
        UserError: if the processor of the folder is missing, not supported, or not that of the tower.
    """
    settings = read_sound_settings(folder)
    frames = settings.count_frames(settings.most_samples)
    for key, value, needed in (("feature_size", settings.mels, shape.mels), ("frames", frames, shape.most_frames)):
        if needed is not None and value != needed:
            raise UserError(f"{folder}: the processor's {key} is {value}, but the audio tower reads {needed}; set that")
    return SoundReader(settings, shape)
