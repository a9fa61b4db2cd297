"""Images and videos as a model reads them: packed patches."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

Grid = tuple[int, int, int]
"""The size of an image or video in patches: steps of frames, rows, columns."""


@dataclass(frozen=True)
class Media:
    """Images and videos in the order of their places in the texts of a batch.

    Attributes:
        patches_NP: the normalized pixels of all patches, (N, channels * frames * side * side); patches of a merge block
            are neighbours, row by row within the block, and blocks follow each other row by row, frame by frame.
        grids: the size of each image or video.
    """

    patches_NP: Tensor
    grids: Sequence[Grid]
