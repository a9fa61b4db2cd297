"""Positions of time, row and column for the tokens of a sample with media."""

from collections.abc import Sequence

from torch import Tensor

from litgpt.data.media.positions import build_media_positions
from litgpt.data.render.example import PlacedMedium
from litgpt.model.tower_config import TowerShape

VISUAL_KINDS = ("image", "video")
"""The kinds of media that have rows and columns."""


def build_sample_positions(shape: TowerShape, ids: Sequence[int], media: Sequence[PlacedMedium]) -> Tensor:
    """The positions (3, T) of a text with these media; the places of other sounds than tracks are as those of text."""
    seen = [each for each in media if each.medium.kind in VISUAL_KINDS]
    grids = [grid for each in seen for grid in each.grids]
    seconds = [step for each in seen for step in each.step_seconds]
    tracked = [range(each.start, each.stop) for each in seen if each.medium.has_track]
    return build_media_positions(shape, ids, grids, seconds=seconds, tracked=tracked)
