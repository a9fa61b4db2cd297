"""Images and videos as a model reads them: packed patches."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

from litgpt.errors import UserError
from litgpt.model.tower_config import TowerShape

Grid = tuple[int, int, int]
"""The size of an image or video in patches: steps of frames, rows, columns."""


@dataclass(frozen=True)
class Media:
    """Images and videos in the order of their places in the texts of a batch.

    Attributes:
        patches_NP: the normalized pixels of all patches, (N, channels * frames * side * side); patches of a merge block
            are neighbours, row by row within the block, and blocks follow each other row by row, frame by frame.
        grids: the size of each image or video.
        sources_BT: for each token of a rank that has some of the tokens, the number of the tower's feature that is at
            its place, or -1; None for a rank that has all.
    """

    patches_NP: Tensor
    grids: Sequence[Grid]
    sources_BT: Tensor | None = None

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "Media":
        """The same on a device."""
        patches_NP = self.patches_NP.to(device, non_blocking=non_blocking)
        sources_BT = None if self.sources_BT is None else self.sources_BT.to(device, non_blocking=non_blocking)
        return replace(self, patches_NP=patches_NP, sources_BT=sources_BT)


def build_empty_media() -> Media:
    """No images, in a batch of a step in which others have some."""
    return Media(torch.zeros(0, 0), ())


def find_sources(ids_BT: Tensor, media: Media, shape: TowerShape) -> Tensor:
    """The `sources_BT` of all tokens of a batch.

    Raises:
        UserError: if the texts do not have a place for each feature.
    """
    sources_BT = number_places(torch.isin(ids_BT, torch.tensor(shape.media_tokens, device=ids_BT.device)))
    places, features = int(sources_BT.max()) + 1, sum(map(prod, media.grids)) // shape.merge**2
    if places != features:
        raise UserError(f"media: {features} features for {places} places in the text; use as many of both")
    return sources_BT


def number_places(is_place_BT: Tensor) -> Tensor:
    """The number of each place, in order from 0; -1 for tokens that are none."""
    return (is_place_BT.flatten().cumsum(0).view_as(is_place_BT) - 1).masked_fill(~is_place_BT, -1)
