"""Open images, resize and normalize them as the published processor of a model folder does, to the bit."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from litgpt.data.media.canvases import (
    choose_canvas,
    count_margins,
    fit_canvas,
    order_canvas,
    order_picture,
    place_on_canvas,
)
from litgpt.data.media.errors import MediumError
from litgpt.data.media.picture_sizes import SIZE_RULES, Size, check_growth, find_tile_grid, fit_tiles
from litgpt.errors import UserError
from litgpt.files import read_json_object
from litgpt.model.feature_order import FeatureOrder
from litgpt.model.media import Grid
from litgpt.model.tower_config import TowerShape

if TYPE_CHECKING:
    from PIL.Image import Image

PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
INTERPOLATIONS = {1: "lanczos", 2: "bilinear", 3: "bicubic"}
CLIP_MEAN, CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
HALF = [0.5, 0.5, 0.5]
CLIP_COLORS, HALF_COLORS = {"image_mean": CLIP_MEAN, "image_std": CLIP_STD}, {"image_mean": HALF, "image_std": HALF}
SHARED: dict[str, Any] = {"resample": 3, "rescale_factor": 1 / 255, "crop_size": None, "max_image_size": None}
SIDES = {"height": 384, "width": 384}
GRID = {**CLIP_COLORS, "size": SIDES, "min_patches": 1, "max_patches": 12}
TILES = {**HALF_COLORS, "resample": 1, "size": {"longest_edge": 1456}, "max_image_size": {"longest_edge": 364}}
VOLUME = {"shortest_edge": 112**2, "longest_edge": 28**2 * 15000}
SQUARE = {**HALF_COLORS, "size": {"height": 224, "width": 224}}
CROP = {"size": {"shortest_edge": 224}, "crop_size": {"height": 224, "width": 224}}
CANVASES = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
MANY_CANVASES = [[height, width] for height in range(384, 2305, 384) for width in range(384, 2305, 384)]
# The size rule of each processor, and the settings that its file may leave out.
PROCESSORS: dict[str, tuple[str, dict[str, Any]]] = {
    "CLIPImageProcessor": ("short_side", {**CLIP_COLORS, **CROP}),
    "LlavaNextImageProcessor": ("short_side", {**CLIP_COLORS, **CROP, "image_grid_pinpoints": CANVASES}),
    "LlavaOnevisionImageProcessor": (
        "square",
        {**SQUARE, **CLIP_COLORS, "size": SIDES, "image_grid_pinpoints": MANY_CANVASES, "cuts_several": False},
    ),
    "BitImageProcessor": ("short_side", {**CLIP_COLORS, **CROP}),
    "SiglipImageProcessor": ("square", SQUARE),
    "Gemma3ImageProcessor": ("square", {**SQUARE, "resample": 2}),
    "Qwen2VLImageProcessor": ("area", {**CLIP_COLORS, "size": {"shortest_edge": 3136, "longest_edge": 1003520}}),
    "Glm4vImageProcessor": ("volume", {**CLIP_COLORS, "size": VOLUME, "temporal_patch_size": 2}),
    "PixtralImageProcessor": ("within", {**CLIP_COLORS, "size": {"longest_edge": 1024}}),
    "GotOcr2ImageProcessor": ("square", GRID),  # of InternVL, whose processor always cuts tiles
    "Idefics3ImageProcessor": ("long_side", TILES),
    "SmolVLMImageProcessor": ("long_side", TILES),
}
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
"""The formats that are decoded; others of Pillow run programs."""
ORIENTATION, FIRST_ON_ITS_SIDE = 0x0112, 5  # tag of EXIF, and the first of its values that swap height and width
REQUIRED_STEPS = ("do_resize", "do_rescale", "do_normalize", "do_center_crop", "do_image_splitting")
"""Steps that a processor's file may turn off, which is not supported."""
REFUSED_STEPS = ("do_pan_and_scan",)
"""Steps that a processor's file may turn on, which is not supported."""


class ColorSettings(Protocol):
    """How the values of pixels are normalized; as of `PictureSettings`."""

    @property
    def mean(self) -> tuple[float, ...]:
        """Of each channel."""

    @property
    def std(self) -> tuple[float, ...]:
        """Of each channel."""

    @property
    def scale(self) -> float:
        """Of values of 0 to 255."""


@dataclass(frozen=True)
class PictureSettings:
    """How the images of a model are resized and normalized.

    Attributes:
        rule: the rule of sizes, a key of `SIZE_RULES`, and its limits.
        crop: height and width that are cut out of the middle, None for all.
        tile: the side of the tiles that an image is cut into, with the whole image as the last one; None for no tiles.
        tile_counts: the least and the most number of tiles of the size in `limits` that an image is cut into, if their
            number does not follow from `tile`; None if it does, or for no tiles.
        canvases: heights and widths of the canvases on one of which an image is cut into tiles; None for no such.
        cuts_several: whether images are cut that are not the only one of a sample, or else padded to squares.
        interpolation: a mode of `torch.nn.functional.interpolate`.
        mean, std: of each channel, as shares of the largest value.
        scale: factor on values of 0 to 255 before they are normalized.
    """

    rule: str
    limits: Mapping[str, int]
    crop: Size | None
    tile: int | None
    tile_counts: tuple[int, int] | None
    canvases: tuple[Size, ...] | None
    cuts_several: bool
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    scale: float


def read_processor(folder: Path, part: str, reads: str) -> tuple[Path, dict[str, Any]]:
    """The file of the processor in a model folder, and its values.

    Args:
        part: the key of these in a file of several processors.
        reads: what the processor is for.

    Raises:
        UserError: if the folder has none.
    """
    path = next((folder / name for name in PROCESSOR_FILES if (folder / name).is_file()), None)
    if path is None:
        names = " or ".join(PROCESSOR_FILES)
        raise UserError(f"{folder}: has no {names}; use the folder of a model that reads {reads}")
    values = read_json_object(path)
    return path, values.get(part, values)


def read_picture_settings(folder: Path) -> PictureSettings:
    """The settings of the processor in a model folder.

    Raises:
        UserError: if the folder has none, or one that is not supported.
    """
    path, values = read_processor(folder, "image_processor", "images")
    kind = str(values.get("image_processor_type")).removesuffix("Fast")
    if kind not in PROCESSORS:
        raise UserError(f"{path}: image_processor_type: {kind} is not supported; use one of {', '.join(PROCESSORS)}")
    for step in REQUIRED_STEPS:
        if values.get(step) is False:
            raise UserError(f"{path}: {step}: false is not supported; use true")
    for step in REFUSED_STEPS:
        if values.get(step):
            raise UserError(f"{path}: {step}: {values[step]} is not supported; use false")
    rule, defaults = PROCESSORS[kind]
    settings = {**SHARED, **defaults, **{key: value for key, value in values.items() if value is not None}}
    size, crop, tile = settings["size"], settings["crop_size"], settings["max_image_size"]
    if rule == "area":  # older files have these keys, which come first, beside the size
        older = {"shortest_edge": values.get("min_pixels"), "longest_edge": values.get("max_pixels")}
        size = {**size, **{key: value for key, value in older.items() if value is not None}}
    if rule == "volume":
        size = {**size, "frames": settings["temporal_patch_size"]}
    if rule == "short_side" and "height" in size:
        rule = "square"
    if crop and max(crop.values()) > (least := size.get("shortest_edge", 0)):
        raise UserError(f"{path}: crop_size: {max(crop.values())} is more than the size of {least}; use {least}")
    if settings["resample"] not in INTERPOLATIONS:
        raise UserError(f"{path}: resample: {settings['resample']} is not supported; use one of {INTERPOLATIONS}")
    return PictureSettings(
        rule=rule,
        limits={key: int(value) for key, value in size.items()},
        crop=(crop["height"], crop["width"]) if crop else None,
        tile=tile["longest_edge"] if tile else None,
        tile_counts=(settings["min_patches"], settings["max_patches"]) if "max_patches" in defaults else None,
        canvases=read_canvases(path, settings) if "image_grid_pinpoints" in defaults else None,
        cuts_several=defaults.get("cuts_several", True),
        interpolation=INTERPOLATIONS[settings["resample"]],
        mean=tuple(settings["image_mean"]),
        std=tuple(settings["image_std"]),
        scale=float(settings["rescale_factor"]),
    )


def read_canvases(path: Path, settings: Mapping[str, Any]) -> tuple[Size, ...]:
    """The canvases of a processor, which are cut into tiles of the size of the whole image.

    Raises:
        UserError: if they cannot be.
    """
    crop, canvases = settings["crop_size"] or {}, settings["image_grid_pinpoints"]
    tile, *others = {*settings["size"].values(), *crop.values()}
    if others:
        raise UserError(f"{path}: size: {settings['size']} with crop_size: {crop} is not supported; use one side")
    if not canvases or any(len(canvas) != 2 or any(side % tile for side in canvas) for canvas in canvases):
        raise UserError(f"{path}: image_grid_pinpoints: {canvases} is not supported; use multiples of {tile}")
    return tuple((height, width) for height, width in canvases)


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
        canvas: in the middle of which it is before it is cut into tiles; None for none.
        square: the side of the square that the original is in the middle of before it is resized; None for none.
        margins: the rows at the top and at the bottom, and columns at each side, of places that are beside it there.
    """

    size: Size
    whole: Size | None
    rows: int
    columns: int
    pictures: tuple[Size, ...]
    canvas: Size | None = None
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
    resized = SIZE_RULES[settings.rule](size, settings.limits, unit)
    check_growth(size, resized)
    if settings.tile_counts is not None:
        rows, columns = find_tile_grid(size, resized, *settings.tile_counts)
        if rows * columns > 1:
            whole = rows * resized[0], columns * resized[1]
            return PicturePlan(whole, None, rows, columns, (resized,) * (rows * columns + 1))
    if settings.tile is None:
        return PicturePlan(resized, None, 0, 0, (settings.crop or resized,), square=square)
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


def resize_picture(pixels_CHW: Tensor, settings: PictureSettings, unit: int, *, alone: bool = True) -> list[Tensor]:
    """The images uint8 (C, H, W) that the tower reads of one, in the order of `PicturePlan.pictures`.

    Args:
        unit: the side of a merge block in pixels.
        alone: as of `plan_picture`.
    """
    plan = plan_picture(get_size(pixels_CHW), settings, unit, alone=alone)
    if plan.square is not None:
        color = [int(share * 255) for share in settings.mean]
        pixels_CHW = place_on_canvas(pixels_CHW, (plan.square, plan.square), color)
    original_CHW = pixels_CHW
    pixels_CHW = interpolate(pixels_CHW, plan.size, settings.interpolation)
    if plan.canvas is not None:
        whole = interpolate(original_CHW, plan.pictures[0], settings.interpolation)
        return [whole, *cut_tiles(place_on_canvas(pixels_CHW, plan.canvas), plan.pictures[0])]
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
    mean, std = (torch.tensor(values) * (1.0 / settings.scale) for values in (settings.mean, settings.std))
    return (pixels_CHW.float() - mean[:, None, None]) / std[:, None, None]
