"""Images on a canvas that is cut into tiles, and which of the features of the tiles stand for them.

The canvas, of one of several sizes, is black around the image, which is as large as fits. The first picture that the
tower reads is the whole image, the others are the tiles. Features of the black margins are left out (LLaVA-NeXT), and
those of many tiles are interpolated (LLaVA-OneVision). Llama 4 has an image at the top left of a canvas, and the whole
image after its tiles, of all of which it reads all features.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from litgpt.data.media.picture_sizes import Size
from litgpt.model.feature_order import FeatureOrder, join_orders

LEAST_SHRINKING = 1.1  # of a canvas with more features than the limit, below which it has them all


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


def place_on_canvas(pixels_CHW: Tensor, canvas: Size, color: Sequence[int] = (0, 0, 0)) -> Tensor:
    """An image in the middle of a canvas of one color, of 0 to 255."""
    canvas_CHW = pixels_CHW.new_tensor(color)[:, None, None].repeat(1, *canvas)
    height, width = pixels_CHW.shape[-2:]
    top, left = (canvas[0] - height) // 2, (canvas[1] - width) // 2
    canvas_CHW[:, top : top + height, left : left + width] = pixels_CHW
    return canvas_CHW


@cache
def list_corner_canvases(tile: int, most: int) -> tuple[Size, ...]:
    """The canvases of at most so many tiles of this side, those of one ratio of sides together, large ones first.

    The order is that of the published processor (Llama 4).
    """
    by_ratio: dict[float, list[Size]] = {}
    for tiles in range(most, 0, -1):
        for rows in (rows for rows in range(1, tiles + 1) if tiles % rows == 0):
            columns = tiles // rows
            by_ratio.setdefault(rows / columns, []).append((rows * tile, columns * tile))
    return tuple(canvas for canvases in by_ratio.values() for canvas in canvases)


def choose_corner_canvas(size: Size, canvases: Sequence[Size]) -> Size:
    """The canvas that an image fits with the least enlargement, or the least shrinking if it fits none without.

    Of several it is the first of those with the fewest pixels. Ratios are float32, as those of the published processor
    (Llama 4), so that canvases that are equally good are the same.
    """
    sides_N2 = torch.tensor(canvases, dtype=torch.float32)
    ratios_N = torch.minimum(sides_N2[:, 0] / size[0], sides_N2[:, 1] / size[1])
    enlarging = ratios_N[ratios_N >= 1]
    best = enlarging.min() if len(enlarging) else ratios_N.max()
    equally_good = (ratios_N == best).tolist()
    return min((canvas for canvas, is_best in zip(canvases, equally_good, strict=True) if is_best), key=math.prod)


def fit_corner(size: Size, canvas: Size, tile: int) -> Size:
    """The size of an image at the top left of a canvas, which it does not exceed; it is enlarged to a tile at most.

    One side is as large as it may be, the other in proportion, rounded down (Llama 4).
    Ratios are float32 where the canvas is smaller than the image and float64 elsewhere, as in the published processor.
    """
    limits = tuple(min(max(side, tile), most) for side, most in zip(size, canvas, strict=True))
    ratios: list[Any] = [
        torch.tensor(limit, dtype=torch.float32) / side if limit < side else limit / side
        for side, limit in zip(size, limits, strict=True)
    ]
    if ratios[1] < ratios[0]:
        return max(min(math.floor(size[0] * ratios[1]), limits[0]), 1), limits[1]
    return limits[0], max(min(math.floor(size[1] * ratios[0]), limits[1]), 1)


def place_in_corner(pixels_CHW: Tensor, canvas: Size) -> Tensor:
    """An image at the top left of a black canvas."""
    height, width = pixels_CHW.shape[-2:]
    return F.pad(pixels_CHW, (0, canvas[1] - width, 0, canvas[0] - height))


def count_margins(size: Size, features: Size) -> Size:
    """The rows of features at the top and at the bottom of a canvas, and columns at each side, without the image.

    Args:
        features: rows and columns of the whole canvas.
    """
    rows, columns = features
    if size[1] / size[0] > columns / rows:
        return (rows - int(round(size[0] * (columns / size[1]), 7))) // 2, 0
    return 0, (columns - int(round(size[1] * (rows / size[0]), 7))) // 2


def order_canvas(rows: int, columns: int, side: int, margins: Size, most_tiles: int | None) -> FeatureOrder:
    """The features of an image and of its canvas, of which each row has an end.

    Args:
        rows, columns: of tiles.
        side: rows and columns of features of a tile.
        margins: as of `count_margins`.
        most_tiles: the number of tiles whose features a canvas has at most; None for all.
    """
    numbers = torch.arange(side**2, (1 + rows * columns) * side**2).view(rows, columns, side, side)
    canvas_HW = numbers.transpose(1, 2).reshape(rows * side, columns * side)
    (top, left), (height, width) = margins, canvas_HW.shape
    kept_HW = canvas_HW[top : height - top, left : width - left]
    shrinking = math.sqrt(kept_HW.numel() / (most_tiles * side**2)) if most_tiles else 1.0
    if shrinking > LEAST_SHRINKING:
        size = int(len(kept_HW) // shrinking), int(kept_HW.shape[1] // shrinking)
        canvas = end_rows(*interpolate_numbers(kept_HW, size))
    else:
        canvas = end_rows(kept_HW[..., None], None)
    whole = FeatureOrder(torch.arange(side**2)[:, None], None, (), 0)
    order = join_orders([whole, canvas])  # whose numbers are of the features of both already
    assert order is not None
    counts = (len(order.numbers_MK), *[0] * (rows * columns))
    return replace(order, counts=counts, features=(1 + rows * columns) * side**2)


def order_picture(side: int) -> FeatureOrder:
    """All features of one picture, with one end.

    Args:
        side: rows and columns of features.
    """
    return replace(end_rows(torch.arange(side**2)[None, :, None], None), counts=(side**2 + 1,), features=side**2)


def order_frames(frames: int, side: int, block: int) -> FeatureOrder:
    """The features of a video, those of each frame interpolated, with one end.

    Args:
        side: rows and columns of features of a frame.
        block: how many times fewer it has then.
    """
    size = math.ceil(side / block), math.ceil(side / block)
    numbers_HWK, weights_HWK = interpolate_numbers(torch.arange(side**2).view(side, side), size)
    starts = torch.arange(frames)[:, None, None] * side**2
    numbers_FMK, weights_FMK = numbers_HWK.flatten(0, 1) + starts, weights_HWK.flatten(0, 1).expand(frames, -1, -1)
    order = end_rows(numbers_FMK.flatten(0, 1)[None], weights_FMK.flatten(0, 1)[None])
    return replace(order, counts=(len(order.numbers_MK),), features=frames * side**2)


def end_rows(numbers_HWK: Tensor, weights_HWK: Tensor | None) -> FeatureOrder:
    """The order of rows of places, each with the learned feature that ends it, without counts."""
    rows, _, taps = numbers_HWK.shape
    numbers_HWK = torch.cat([numbers_HWK, numbers_HWK.new_full((rows, 1, taps), -1)], 1)
    weights_MK = None
    if weights_HWK is not None:
        weights_MK = torch.cat([weights_HWK, torch.eye(1, taps).expand(rows, 1, taps)], 1).flatten(0, 1)
    return FeatureOrder(numbers_HWK.flatten(0, 1), weights_MK, (), 0)


def interpolate_numbers(numbers_HW: Tensor, size: Size) -> tuple[Tensor, Tensor]:
    """The numbers and the weights, (height, width, 4) each, of the features around each of fewer or more places.

    Both images have the same edges; weights are bilinear, as those of `torch.nn.functional.interpolate`.
    """
    (rows_H2, row_weights_H2), (columns_W2, column_weights_W2) = (
        find_taps(length, new) for length, new in zip(numbers_HW.shape, size, strict=True)
    )
    numbers_HWK = numbers_HW[rows_H2[:, None, :, None], columns_W2[None, :, None, :]].flatten(2)
    weights_HWK = (row_weights_H2[:, None, :, None] * column_weights_W2[None, :, None, :]).flatten(2)
    return numbers_HWK, weights_HWK


def find_taps(length: int, new: int) -> tuple[Tensor, Tensor]:
    """The two of `length` places around each of `new` ones, and their weights, (new, 2) each."""
    exact = ((torch.arange(new) + 0.5) * (length / new) - 0.5).clamp(min=0)
    below = exact.floor()
    share = exact - below
    places = torch.stack([below, (below + 1).clamp(max=length - 1)], 1).long()
    return places, torch.stack([1 - share, share], 1)
