"""Images on a canvas that is cut into tiles, and which of the features of the tiles stand for them (LLaVA-NeXT).

The canvas, of one of several sizes, is black around the image, which is as large as fits. The first picture that the
tower reads is the whole image, the others are the tiles. Features of the black margins are left out.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from litgpt.data.media.picture_sizes import Size


def choose_canvas(size: Size, canvases: Sequence[Size]) -> Size:
    """The canvas on which an image keeps most of its pixels, of several the one with the smallest margins."""

    def rate(canvas: Size) -> tuple[int, int]:
        scale = min(canvas[1] / size[1], canvas[0] / size[0])
        pixels = min(int(size[0] * scale) * int(size[1] * scale), math.prod(size))
        return pixels, pixels - math.prod(canvas)

    return max(canvases, key=rate)  # the first of those that are equally good


def fit_canvas(size: Size, canvas: Size) -> Size:
    """The size of an image on a canvas: one side is the canvas's, the other in proportion."""
    growth = canvas[0] / size[0], canvas[1] / size[1]
    if growth[1] < growth[0]:
        return min(math.ceil(size[0] * growth[1]), canvas[0]), canvas[1]
    return canvas[0], min(math.ceil(size[1] * growth[0]), canvas[1])


def place_on_canvas(pixels_CHW: Tensor, canvas: Size) -> Tensor:
    """An image in the middle of a black canvas."""
    canvas_CHW = pixels_CHW.new_zeros(len(pixels_CHW), *canvas)
    height, width = pixels_CHW.shape[-2:]
    top, left = (canvas[0] - height) // 2, (canvas[1] - width) // 2
    canvas_CHW[:, top : top + height, left : left + width] = pixels_CHW
    return canvas_CHW


def count_margins(size: Size, features: Size) -> Size:
    """The rows of features at the top and at the bottom of a canvas, and columns at each side, without the image.

    Args:
        features: rows and columns of the whole canvas.
    """
    rows, columns = features
    if size[1] / size[0] > columns / rows:
        return (rows - int(round(size[0] * (columns / size[1]), 7))) // 2, 0
    return 0, (columns - int(round(size[1] * (rows / size[0]), 7))) // 2


def order_features(rows: int, columns: int, side: int, margins: Size) -> Tensor:
    """The numbers of the tower's features at the places of an image, (M,), -1 for the end of a row of the canvas.

    Args:
        rows, columns: of tiles.
        side: rows and columns of features of a tile.
        margins: as of `count_margins`.
    """
    numbers = torch.arange(side**2, (1 + rows * columns) * side**2).view(rows, columns, side, side)
    canvas_HW = numbers.transpose(1, 2).reshape(rows * side, columns * side)
    (top, left), (height, width) = margins, canvas_HW.shape
    kept_HW = canvas_HW[top : height - top, left : width - left]
    ended = torch.cat([kept_HW, kept_HW.new_full((len(kept_HW), 1), -1)], 1)
    return torch.cat([torch.arange(side**2), ended.flatten()])
