"""Cut images into packed patches, in the order in which a vision tower reads them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from litgpt.model.media import Grid, Media
from litgpt.model.tower_config import TowerShape


def cut_patches(frames_FCHW: Tensor, shape: TowerShape) -> tuple[Tensor, Grid]:
    """The patches (N, C * temporal * patch * patch) of an image or a video, and its size in patches.

    Args:
        frames_FCHW: an image as one frame, or the frames of a video; the last is repeated to fill the last patch.
            Height and width are multiples of `patch * merge`, or with `merge` 1 of any size, of which the pixels at the
            right and below that fill no patch are left out, as a convolution does.
    """
    side, merge = shape.patch, shape.merge
    missing = -len(frames_FCHW) % shape.temporal
    frames_FCHW = torch.cat([frames_FCHW, frames_FCHW[-1:].expand(missing, -1, -1, -1)])
    steps, height, width = len(frames_FCHW) // shape.temporal, *(size // side for size in frames_FCHW.shape[-2:])
    frames_FCHW = frames_FCHW[..., : height * side, : width * side]
    # step, frame, channel, block row, row in block, row of pixels, block column, column in block, column of pixels
    pixels = frames_FCHW.reshape(steps, shape.temporal, -1, height // merge, merge, side, width // merge, merge, side)
    patches = pixels.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(steps * height * width, -1)
    return patches, (steps, height, width)


def pack_media(items: Sequence[tuple[Tensor, Grid]]) -> Media:
    """The media of a batch, from the patches and the size of each in order."""
    return Media(torch.cat([patches for patches, _ in items]), tuple(grid for _, grid in items))


def count_places(grid: Grid, shape: TowerShape) -> int:
    """The number of tokens at whose places a text has the features of an image or video."""
    steps, height, width = grid
    return steps * height * width // shape.merge**2
