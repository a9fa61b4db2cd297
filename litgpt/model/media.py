"""Images and videos as a model reads them: packed patches."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
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

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "Media":
        """The same on a device."""
        return Media(self.patches_NP.to(device, non_blocking=non_blocking), self.grids)


def build_empty_media() -> Media:
    """No images, in a batch of a step in which others have some."""
    return Media(torch.zeros(0, 0), ())
