"""Images, videos and sounds as a model reads them: packed patches and packed frames."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

from litgpt.errors import UserError
from litgpt.model.audio_config import AudioShape
from litgpt.model.feature_order import FeatureOrder
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
        uses: the numbers of the images or videos at the places of the texts, in their order, if an image may be at
            several; None for each at one.
        answers: the number of the answer that each of `uses` is in; None if answers are not numbered.
        sources_BT: for each token of a rank that has some of the tokens, the number of the feature that is at its
            place, those of sounds after those of images, or -1; None for a rank that has all.
        sounds: the sounds; None for none.
        order: the features of images and videos at their places; None for all in order.
    """

    patches_NP: Tensor
    grids: Sequence[Grid]
    uses: Sequence[int] | None = None
    answers: Sequence[int] | None = None
    sources_BT: Tensor | None = None
    sounds: Sounds | None = None
    order: FeatureOrder | None = None

    @property
    def is_empty(self) -> bool:
        """Whether there are none."""
        return not self.grids and self.sounds is None

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "Media":
        """The same on a device."""
        patches_NP = self.patches_NP.to(device, non_blocking=non_blocking)
        sources_BT = None if self.sources_BT is None else self.sources_BT.to(device, non_blocking=non_blocking)
        order = None if self.order is None else self.order.to(device, non_blocking=non_blocking)
        sounds = self.sounds
        if sounds is not None:
            sounds = replace(sounds, frames_NM=sounds.frames_NM.to(device, non_blocking=non_blocking))
        return replace(self, patches_NP=patches_NP, sources_BT=sources_BT, sounds=sounds, order=order)

    def select_answers(self, numbers: Sequence[int]) -> "Media":
        """The media of some answers, which are numbered anew in their order; all images are kept."""
        assert self.uses is not None and self.answers is not None
        renumbered = {number: index for index, number in enumerate(numbers)}
        kept = [(use, renumbered[answer]) for use, answer in self._list_uses() if answer in renumbered]
        return replace(self, uses=[use for use, _ in kept], answers=[answer for _, answer in kept])

    def list_images(self, answer_number: int) -> list[int]:
        """The images at the places of an answer, in their order."""
        return [use for use, answer in self._list_uses() if answer == answer_number]

    def _list_uses(self) -> list[tuple[int, int]]:
        return list(zip(self.uses or (), self.answers or (), strict=True))

    def split_patches(self) -> list[Tensor]:
        """The patches of each image or video."""
        return list(self.patches_NP.split(list(map(prod, self.grids))))


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
    for tokens, sources, features in list_features(media, config):
        numbers = number_places(torch.isin(ids_BT, torch.tensor(tokens, device=ids_BT.device)))
        if (places := count_found(numbers)) != len(sources):
            raise UserError(f"media: {len(sources)} features for {places} places in the text; use as many of both")
        if places:
            sources_BT = torch.where(numbers >= 0, sources.to(ids_BT.device)[numbers] + numbered, sources_BT)
        numbered += features
    return sources_BT


def list_features(media: Media, config: TransformerConfig) -> list[tuple[list[int], Tensor, int]]:
    """For each tower of a model the tokens at whose places its features are, the features there and their number."""
    listed = list[tuple[list[int], Tensor, int]]()
    if config.vision is not None:
        tower = TowerShape.from_values(config.vision)
        in_order = [prod(grid) // tower.merge**2 for grid in media.grids]
        counts = in_order if media.order is None else list(media.order.counts)
        numbers = torch.arange(sum(counts))
        if media.uses is not None:
            of_images = numbers.split(counts)
            numbers = torch.cat([numbers[:0], *(of_images[use] for use in media.uses)])
        listed.append((tower.media_tokens, numbers, sum(counts)))
    if config.audio is not None:
        audio = AudioShape.from_values(config.audio)
        lengths = () if media.sounds is None else media.sounds.lengths
        features = sum(map(audio.count_features, lengths))
        listed.append((audio.media_tokens, torch.arange(features), features))
    return listed


def count_found(numbers_BT: Tensor) -> int:
    """The number of places in the texts of a batch, which are numbered."""
    return int(numbers_BT.max()) + 1


def number_places(is_place_BT: Tensor) -> Tensor:
    """The number of each place, in order from 0; -1 for tokens that are none."""
    return (is_place_BT.flatten().cumsum(0).view_as(is_place_BT) - 1).masked_fill(~is_place_BT, -1)
