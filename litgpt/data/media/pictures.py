"""Open images, resize and normalize them as the published processor of a model folder does, to the bit."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from litgpt.data.media.canvases import (
    choose_canvas,
    choose_corner_canvas,
    count_margins,
    fit_canvas,
    fit_corner,
    list_corner_canvases,
    order_canvas,
    order_picture,
    place_in_corner,
    place_on_canvas,
)
from litgpt.data.media.errors import MediumError
from litgpt.data.media.picture_settings import ColorSettings, PictureSettings
from litgpt.data.media.picture_sizes import SIZE_RULES, Size, check_growth, find_tile_grid, fit_tiles
from litgpt.model.feature_order import FeatureOrder
from litgpt.model.media import Grid
from litgpt.model.tower_config import TowerShape

if TYPE_CHECKING:
    from PIL.Image import Image

IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
"""The formats that are decoded; others of Pillow run programs."""
ORIENTATION, FIRST_ON_ITS_SIDE = 0x0112, 5  # tag of EXIF, and the first of its values that swap height and width


@contextmanager
def open_image(source: "Path | bytes | Image") -> Iterator["Image"]:
    """Open an image, of which the header is read at once and the pixels when they are needed.

    Raises:
        MediumError: here and in the block, if it is not an image of these formats and sizes, or cannot be decoded.
    """
    from PIL import Image

    name = str(source) if isinstance(source, Path) else "image"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is wrong with a file is in the error, if it cannot be read
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            if isinstance(source, Path) and not source.is_file():  # a pipe would wait for a writer
                raise FileNotFoundError("no such file")
            if isinstance(source, Image.Image):
                yield source
                return
            with Image.open(BytesIO(source) if isinstance(source, bytes) else source, formats=IMAGE_FORMATS) as image:
                yield image
    except FileNotFoundError:
        raise MediumError(name, "image not found", "no such file", "correct the path") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        size = str(error).partition(" exceeds")[0]
        cure = f"use one of at most {Image.MAX_IMAGE_PIXELS:,}"
        raise MediumError(name, "image with too many pixels", size, cure) from None
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        detail = str(error).partition(" <")[0]
        raise MediumError(name, "not an image that can be read", detail, "use e.g. a PNG or JPEG file") from None


def read_picture_size(source: "Path | bytes | Image") -> Size:
    """Height and width of an image, turned as its EXIF says, from its header.

    Raises:
        MediumError: as `open_image`.
    """
    with open_image(source) as image:
        turned = image.getexif().get(ORIENTATION, 1) >= FIRST_ON_ITS_SIDE
        return (image.width, image.height) if turned else (image.height, image.width)


def open_picture(source: "Path | bytes | Image") -> Tensor:
    """The pixels of an image, uint8 (3, H, W): turned as its EXIF says, transparent ones over white.

    Raises:
        MediumError: as `open_image`.
    """
    from PIL import Image, ImageOps

    with open_image(source) as opened:
        image = ImageOps.exif_transpose(opened)
        if image.has_transparency_data:
            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, (255, 255, 255, 255))
            image = Image.alpha_composite(white, image)
        image = image.convert("RGB")
    values = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return values.view(image.height, image.width, 3).permute(2, 0, 1).contiguous()


@dataclass(frozen=True)
class PicturePlan:
    """The images that the tower reads of one.

    Attributes:
        size: to which it is resized at first.
        whole: to which it is resized then, before it is cut into tiles, or is the last image; None if it is as it is,
            and the last image is resized from the original.
        rows, columns: of tiles; 0 without.
        pictures: the size of each, tiles row by row and the whole at last, or at first with a canvas.
        canvas: in the middle of which it is, before it is cut into tiles if it has them; None for none.
        corner: the canvas at whose top left it is before it is cut into tiles; None for none.
        square: the side of the square that the original is in the middle of before it is resized; None for none.
        margins: the rows at the top and at the bottom, and columns at each side, of places that are beside it there.
    """

    size: Size
    whole: Size | None
    rows: int
    columns: int
    pictures: tuple[Size, ...]
    canvas: Size | None = None
    corner: Size | None = None
    square: int | None = None
    margins: Size = (0, 0)
    seconds: ClassVar[float | None] = None  # a still image takes no time

    def list_grids(self, side: int) -> tuple[Grid, ...]:
        """The size of each image in patches of this side."""
        return tuple((1, height // side, width // side) for height, width in self.pictures)

    def build_order(self, shape: TowerShape) -> FeatureOrder:
        """The features of a tower with a line break at its places."""
        side = self.pictures[0][0] // shape.patch // shape.merge
        if self.canvas is None:
            return order_picture(side)
        return order_canvas(self.rows, self.columns, side, self.margins, shape.canvas_tiles)


def plan_picture(size: Size, settings: PictureSettings, unit: int, *, alone: bool = True) -> PicturePlan:
    """The images that the tower reads of one of this size.

    Args:
        unit: the side of a merge block in pixels.
        alone: whether it is the only image of a sample.

    Raises:
        UserError: if it is too narrow, or would be too large.
    """
    square = None
    if settings.canvases is not None:
        if alone or settings.cuts_several:
            return plan_canvas(size, settings, unit)
        square = max(size)
        check_growth(size, (square, square))
        size = (square, square)
    if settings.corner_tiles is not None:
        return plan_corner(size, settings.limits["height"], settings.corner_tiles)
    resized = SIZE_RULES[settings.rule](size, settings.limits, unit)
    canvas = (max(resized), max(resized)) if settings.rule == "padded" else None
    check_growth(size, canvas or resized)
    if settings.tile_counts is not None:
        rows, columns = find_tile_grid(size, resized, *settings.tile_counts)
        if rows * columns > 1:
            whole = rows * resized[0], columns * resized[1]
            return PicturePlan(whole, None, rows, columns, (resized,) * (rows * columns + 1))
    if settings.tile is None:
        return PicturePlan(resized, None, 0, 0, (canvas or settings.crop or resized,), canvas, square=square)
    tile = settings.tile
    whole = fit_tiles(resized, tile)
    rows, columns = whole[0] // tile, whole[1] // tile
    if rows * columns == 1:
        return PicturePlan(resized, whole, 0, 0, (whole,))
    return PicturePlan(resized, whole, rows, columns, ((tile, tile),) * (rows * columns + 1))


def plan_canvas(size: Size, settings: PictureSettings, unit: int) -> PicturePlan:
    """The whole image and the tiles of its canvas, all of one size."""
    assert settings.canvases is not None
    tile, canvas = next(iter(settings.limits.values())), choose_canvas(size, settings.canvases)
    rows, columns = canvas[0] // tile, canvas[1] // tile
    margins = count_margins(size, (rows * (tile // unit), columns * (tile // unit)))
    pictures = ((tile, tile),) * (1 + rows * columns)
    return PicturePlan(fit_canvas(size, canvas), None, rows, columns, pictures, canvas, margins=margins)


def plan_corner(size: Size, tile: int, most_tiles: int) -> PicturePlan:
    """The tiles of the canvas at whose top left an image is, and the whole image after them if they are several."""
    canvas = choose_corner_canvas(size, list_corner_canvases(tile, most_tiles))
    check_growth(size, canvas)
    rows, columns = canvas[0] // tile, canvas[1] // tile
    if (tiles := rows * columns) == 1:
        return PicturePlan(fit_corner(size, canvas, tile), None, 0, 0, (canvas,), corner=canvas)
    pictures = ((tile, tile),) * (tiles + 1)
    return PicturePlan(fit_corner(size, canvas, tile), None, rows, columns, pictures, corner=canvas)


def resize_picture(pixels_CHW: Tensor, settings: PictureSettings, unit: int, *, alone: bool = True) -> list[Tensor]:
    """The images uint8 (C, H, W) that the tower reads of one, in the order of `PicturePlan.pictures`.

    Args:
        unit: the side of a merge block in pixels.
        alone: as of `plan_picture`.
    """
    plan = plan_picture(get_size(pixels_CHW), settings, unit, alone=alone)
    color = [int(share * 255) for share in settings.mean]
    if plan.square is not None:
        pixels_CHW = place_on_canvas(pixels_CHW, (plan.square, plan.square), color)
    original_CHW = pixels_CHW
    pixels_CHW = interpolate(pixels_CHW, plan.size, settings.interpolation)
    if plan.canvas is not None and not plan.rows:
        return [place_on_canvas(pixels_CHW, plan.canvas, color)]
    if plan.canvas is not None:
        whole = interpolate(original_CHW, plan.pictures[0], settings.interpolation)
        return [whole, *cut_tiles(place_on_canvas(pixels_CHW, plan.canvas), plan.pictures[0])]
    if plan.corner is not None:
        pixels_CHW = place_in_corner(pixels_CHW, plan.corner)
    if settings.crop is not None:
        return [crop_middle(pixels_CHW, settings.crop)]
    if plan.whole is not None:
        pixels_CHW = interpolate(pixels_CHW, plan.whole, settings.interpolation)
    if not plan.rows:
        return [pixels_CHW]
    tile, tiles = plan.pictures[-1], cut_tiles(pixels_CHW, plan.pictures[-1])
    return [*tiles, interpolate(original_CHW if plan.whole is None else pixels_CHW, tile, settings.interpolation)]


def cut_tiles(pixels_CHW: Tensor, tile: Size) -> list[Tensor]:
    """The tiles of an image, row by row."""
    return [part for band in pixels_CHW.split(tile[0], 1) for part in band.split(tile[1], 2)]


def get_size(pixels_CHW: Tensor) -> Size:
    """Height and width."""
    return pixels_CHW.shape[-2], pixels_CHW.shape[-1]


def interpolate(pixels_CHW: Tensor, size: Size, mode: str) -> Tensor:
    """Resize an image with antialiasing, in uint8."""
    if get_size(pixels_CHW) == size:
        return pixels_CHW
    return F.interpolate(pixels_CHW[None], size, mode=mode, antialias=True)[0]


def crop_middle(pixels_CHW: Tensor, size: Size) -> Tensor:
    """The middle of an image that is at least as large as `size`."""
    top, left = (int((have - want) / 2) for have, want in zip(get_size(pixels_CHW), size, strict=True))
    return pixels_CHW[:, top : top + size[0], left : left + size[1]]


def normalize_picture(pixels_CHW: Tensor, settings: ColorSettings) -> Tensor:
    """Pixels of 0 to 255 as float32 with the mean and the deviation of the settings removed, (..., C, H, W)."""
    if settings.in_bfloat16:
        mean, std = (torch.tensor(values, dtype=torch.bfloat16) for values in (settings.mean, settings.std))
        scaled_CHW = pixels_CHW.bfloat16() * settings.scale
        return ((scaled_CHW - mean[:, None, None]) / std[:, None, None]).float()
    mean, std = (torch.tensor(values) * (1.0 / settings.scale) for values in (settings.mean, settings.std))
    return (pixels_CHW.float() - mean[:, None, None]) / std[:, None, None]
