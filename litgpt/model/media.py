"""Images, videos and sounds as a model reads them: packed patches and packed frames."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

from litgpt.errors import UserError
from litgpt.model.audio_config import AudioShape
from litgpt.model.tower_config import TowerShape
from litgpt.model.transformer_config import TransformerConfig

Grid = tuple[int, int, int]
"""The size of an image or video in patches: steps of frames, rows, columns."""


@dataclass(frozen=True)
class Sounds:
    """Sounds in the order of their places in the texts of a batch.

    Attributes:
        frames_NM: the log-mel frames of all sounds, (N, mels); of each, its own and those of the silence after it that
            `AudioShape.count_read_frames` counts.
        lengths: the number of its own frames of each sound.
    """

    frames_NM: Tensor
    lengths: tuple[int, ...]


@dataclass(frozen=True)
class Media:
    """Images, videos and sounds in the order of their places in the texts of a batch.

    Attributes:
        patches_NP: the normalized pixels of all patches, (N, channels * frames * side * side); patches of a merge block
            are neighbours, row by row within the block, and blocks follow each other row by row, frame by frame.
        grids: the size of each image or video.
        sources_BT: for each token of a rank that has some of the tokens, the number of the feature that is at its
            place, those of sounds after those of images, or -1; None for a rank that has all.
        sounds: the sounds; None for none.
    """

    patches_NP: Tensor
    grids: Sequence[Grid]
    sources_BT: Tensor | None = None
    sounds: Sounds | None = None

    @property
    def is_empty(self) -> bool:
        """Whether there are none."""
        return not self.grids and self.sounds is None

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "Media":
        """The same on a device."""
        patches_NP = self.patches_NP.to(device, non_blocking=non_blocking)
        sources_BT = None if self.sources_BT is None else self.sources_BT.to(device, non_blocking=non_blocking)
        sounds = self.sounds
        if sounds is not None:
            sounds = replace(sounds, frames_NM=sounds.frames_NM.to(device, non_blocking=non_blocking))
        return replace(self, patches_NP=patches_NP, sources_BT=sources_BT, sounds=sounds)


def build_empty_media() -> Media:
    """No images or sounds, in a batch of a step in which others have some."""
    return Media(torch.zeros(0, 0), ())


def pack_sounds(frames_NM: Tensor, lengths: Sequence[int]) -> Media:
    """Sounds alone, of these frames and lengths, as in `Sounds`."""
    return replace(build_empty_media(), sounds=Sounds(frames_NM, tuple(lengths)))


def find_sources(ids_BT: Tensor, media: Media, config: TransformerConfig) -> Tensor:
    """The `sources_BT` of all tokens of a batch.

    Raises:
        UserError: if the texts do not have a place for each feature.
    """
    sources_BT, numbered = torch.full_like(ids_BT, -1), 0
    for tokens, features in list_feature_counts(media, config):
        numbers = number_places(torch.isin(ids_BT, torch.tensor(tokens, device=ids_BT.device)))
        places = int(numbers.max()) + 1
        if places != features:
            raise UserError(f"media: {features} features for {places} places in the text; use as many of both")
        sources_BT = torch.where(numbers >= 0, numbers + numbered, sources_BT)
        numbered += features
    return sources_BT


def list_feature_counts(media: Media, config: TransformerConfig) -> list[tuple[list[int], int]]:
    """For each tower of a model the tokens at whose places its features are, and the number of features."""
    counts = list[tuple[list[int], int]]()
    if config.vision is not None:
        tower = TowerShape.from_values(config.vision)
        counts.append((tower.media_tokens, sum(map(prod, media.grids)) // tower.merge**2))
    if config.audio is not None:
        audio = AudioShape.from_values(config.audio)
        lengths = () if media.sounds is None else media.sounds.lengths
        counts.append((audio.media_tokens, sum(map(audio.count_features, lengths))))
    return counts


def number_places(is_place_BT: Tensor) -> Tensor:
    """The number of each place, in order from 0; -1 for tokens that are none."""
    return (is_place_BT.flatten().cumsum(0).view_as(is_place_BT) - 1).masked_fill(~is_place_BT, -1)
