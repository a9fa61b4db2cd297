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
        uses, answers: as in `Media`, of sounds.
        counts: the number of `frames_NM` of each sound; None if no one needs them apart.
    """

    frames_NM: Tensor
    lengths: tuple[int, ...]
    uses: Sequence[int] | None = None
    answers: Sequence[int] | None = None
    counts: tuple[int, ...] | None = None

    def select_answers(self, numbers: Sequence[int]) -> "Sounds":
        """The sounds of some answers, as `Media.select_answers`."""
        uses, answers = select_uses(self.uses, self.answers, numbers)
        return replace(self, uses=uses, answers=answers)

    def list_sounds(self, answer_number: int) -> list[int]:
        """The sounds at the places of an answer, in their order."""
        return list_uses(self.uses, self.answers, answer_number)

    def split_frames(self) -> list[Tensor]:
        """The frames of each sound."""
        assert self.counts is not None
        return list(self.frames_NM.split(list(self.counts)))


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
        """The media of some answers, which are numbered anew in their order; all images and sounds are kept."""
        sounds = None if self.sounds is None else self.sounds.select_answers(numbers)
        if not self.grids:
            return replace(self, sounds=sounds)
        uses, answers = select_uses(self.uses, self.answers, numbers)
        return replace(self, uses=uses, answers=answers, sounds=sounds)

    def list_images(self, answer_number: int) -> list[int]:
        """The images at the places of an answer, in their order."""
        return list_uses(self.uses, self.answers, answer_number)

    def split_patches(self) -> list[Tensor]:
        """The patches of each image or video."""
        return list(self.patches_NP.split(list(map(prod, self.grids))))


def select_uses(
    uses: Sequence[int] | None, answers: Sequence[int] | None, numbers: Sequence[int]
) -> tuple[list[int], list[int]]:
    """The `uses` and `answers` of some answers, which are numbered anew in their order."""
    assert uses is not None and answers is not None
    renumbered = {number: index for index, number in enumerate(numbers)}
    kept = [(use, renumbered[answer]) for use, answer in zip(uses, answers, strict=True) if answer in renumbered]
    return [use for use, _ in kept], [answer for _, answer in kept]


def list_uses(uses: Sequence[int] | None, answers: Sequence[int] | None, answer_number: int) -> list[int]:
    """The `uses` of one answer."""
    return [use for use, answer in zip(uses or (), answers or (), strict=True) if answer == answer_number]


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
        listed.append((tower.media_tokens, number_features(counts, media.uses), sum(counts)))
    if config.audio is not None:
        audio = AudioShape.from_values(config.audio)
        lengths, uses = ((), None) if media.sounds is None else (media.sounds.lengths, media.sounds.uses)
        counts = list(map(audio.count_features, lengths))
        listed.append((audio.media_tokens, number_features(counts, uses), sum(counts)))
    return listed


def number_features(counts: Sequence[int], uses: Sequence[int] | None) -> Tensor:
    """The numbers of the features at the places of media, (M,).

    Args:
        counts: of the features of each.
        uses: as in `Media`.
    """
    numbers = torch.arange(sum(counts))
    if uses is None:
        return numbers
    of_media = numbers.split(list(counts))
    return torch.cat([numbers[:0], *(of_media[use] for use in uses)])


def count_found(numbers_BT: Tensor) -> int:
    """The number of places in the texts of a batch, which are numbered."""
    return int(numbers_BT.max()) + 1


def number_places(is_place_BT: Tensor) -> Tensor:
    """The number of each place, in order from 0; -1 for tokens that are none."""
    return (is_place_BT.flatten().cumsum(0).view_as(is_place_BT) - 1).masked_fill(~is_place_BT, -1)
