"""How the images of a model are resized and normalized: the settings of the processor in its folder."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from litgpt.data.media.picture_sizes import SIZE_KEYS, Size, check_most, read_limits, read_sides
from litgpt.errors import UserError
from litgpt.files import read_json_object
from litgpt.model.colors import check_color, check_scale

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
CORNER = {"size": {"height": 336, "width": 336}, "max_patches": 16, "resize_to_max_canvas": False}
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
    "JanusImageProcessor": ("padded", {**CLIP_COLORS, "size": SIDES, "min_size": 14, "do_pad": True}),
    "Llama4ImageProcessor": ("square", {**HALF_COLORS, **CORNER, "resample": 2, "in_bfloat16": True}),
}
REQUIRED_STEPS = ("do_resize", "do_rescale", "do_normalize", "do_center_crop", "do_image_splitting")
"""Steps that a processor's file may turn off, which is not supported."""
REFUSED_STEPS = ("do_pan_and_scan", "resize_to_max_canvas")
"""Steps that a processor's file may turn on, which is not supported."""

MOST_TILES = 256  # 16 times as many as Llama 4 has


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

    @property
    def in_bfloat16(self) -> bool:
        """Whether values are rounded after each step."""


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
        corner_tiles: the most number of tiles, of the size in `limits`, of a canvas at whose top left an image is when
            it is cut; None for no such.
        cuts_several: whether images are cut that are not the only one of a sample, or else padded to squares.
        interpolation: a mode of `torch.nn.functional.interpolate`.
        mean, std: of each channel, as shares of the largest value.
        scale: factor on values of 0 to 255 before they are normalized.
        in_bfloat16: whether values are rounded to bfloat16 after each step of that.
    """

    rule: str
    limits: Mapping[str, int]
    crop: Size | None
    tile: int | None
    tile_counts: tuple[int, int] | None
    canvases: tuple[Size, ...] | None
    corner_tiles: int | None
    cuts_several: bool
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    scale: float
    in_bfloat16: bool


def read_processor(folder: Path, part: str, reads: str) -> tuple[Path, dict[str, Any]]:
    """The file of the processor in a model folder, and its values.

    Args:
        part: the key of these in a file of several processors.
        reads: what the processor is for.

    Raises:
        UserError: if the folder has none, or its file is damaged.
    """
    path = next((folder / name for name in PROCESSOR_FILES if (folder / name).is_file()), None)
    if path is None:
        names = " or ".join(PROCESSOR_FILES)
        raise UserError(f"{folder}: has no {names}; use the folder of a model that reads {reads}")
    values = read_json_object(path)
    if not isinstance(settings := values.get(part, values), dict):
        raise UserError(f"{path}: {part}: {settings} is not supported; download the file again")
    return path, settings


def read_picture_settings(folder: Path) -> PictureSettings:
    """The settings of the processor in a model folder.

    Raises:
        UserError: if the folder has none, or one that is not supported.
    """
    path, values = read_processor(folder, "image_processor", "images")
    kind = str(values.get("image_processor_type")).removesuffix("Fast")
    if kind not in PROCESSORS:
        raise UserError(f"{path}: image_processor_type: {kind} is not supported; use one of {', '.join(PROCESSORS)}")
    rule, defaults = PROCESSORS[kind]
    for step in (*REQUIRED_STEPS, *({"do_pad"} & defaults.keys())):
        if values.get(step) is False:
            raise UserError(f"{path}: {step}: false is not supported; use true")
    for step in REFUSED_STEPS:
        if values.get(step):
            raise UserError(f"{path}: {step}: {values[step]} is not supported; use false")
    settings = {**SHARED, **defaults, **{key: value for key, value in values.items() if value is not None}}
    (rule, limits), has_canvases = read_limits(path, rule, settings), "image_grid_pinpoints" in defaults
    crop = read_sides(path, "crop_size", settings["crop_size"], SIZE_KEYS["square"]) if settings["crop_size"] else {}
    tile, resample = settings["max_image_size"], settings["resample"]
    if crop and max(crop.values()) > (least := limits.get("shortest_edge", 0)):
        raise UserError(f"{path}: crop_size: {max(crop.values())} is more than the size of {least}; use {least}")
    if type(resample) is not int or resample not in INTERPOLATIONS:
        raise UserError(f"{path}: resample: {resample} is not supported; use one of {INTERPOLATIONS}")
    return PictureSettings(
        rule=rule,
        limits=limits,
        crop=(crop["height"], crop["width"]) if crop else None,
        tile=read_sides(path, "max_image_size", tile, ("longest_edge",))["longest_edge"] if tile else None,
        tile_counts=read_tile_counts(path, settings) if "min_patches" in defaults else None,
        canvases=read_canvases(path, settings, {*limits.values(), *crop.values()}) if has_canvases else None,
        corner_tiles=read_corner_tiles(path, settings, limits) if "resize_to_max_canvas" in defaults else None,
        cuts_several=defaults.get("cuts_several", True),
        interpolation=INTERPOLATIONS[resample],
        mean=check_color(path, "image_mean", settings["image_mean"]),
        std=check_color(path, "image_std", settings["image_std"]),
        scale=check_scale(path, settings["rescale_factor"]),
        in_bfloat16=defaults.get("in_bfloat16", False),
    )


def read_canvases(path: Path, settings: Mapping[str, Any], sides: set[int]) -> tuple[Size, ...]:
    """The canvases of a processor, which are cut into tiles of the size of the whole image.

    Args:
        sides: of the whole image, before and after its middle is cut out.

    Raises:
        UserError: if they cannot be.
    """
    tile, *others = sides
    if others:
        crop = settings["crop_size"] or {}
        raise UserError(f"{path}: size: {settings['size']} with crop_size: {crop} is not supported; use one side")
    canvases = settings["image_grid_pinpoints"]
    given = canvases if isinstance(canvases, list) else []
    if not given or not all(isinstance(canvas, list) and len(canvas) == 2 for canvas in given):
        raise UserError(f"{path}: image_grid_pinpoints: {canvases} is not supported; use pairs of multiples of {tile}")
    if any(type(side) is not int or side < 1 or side % tile for canvas in given for side in canvas):
        raise UserError(f"{path}: image_grid_pinpoints: {canvases} is not supported; use multiples of {tile}")
    return tuple((height, width) for height, width in given)


def read_tile_counts(path: Path, settings: Mapping[str, Any]) -> tuple[int, int]:
    """The least and the most number of tiles of an image.

    Raises:
        UserError: if they are no such numbers.
    """
    most = check_most(path, "max_patches", settings["max_patches"], MOST_TILES)
    return check_most(path, "min_patches", settings["min_patches"], most), most


def read_corner_tiles(path: Path, settings: Mapping[str, Any], limits: Mapping[str, int]) -> int:
    """The most number of tiles, which are squares, of the canvases of a processor.

    Args:
        limits: height and width of a tile.

    Raises:
        UserError: if they are no squares, or too many.
    """
    if len({*limits.values()}) > 1:
        raise UserError(f"{path}: size: {settings['size']} is not supported; use the same height and width")
    return check_most(path, "max_patches", settings["max_patches"], MOST_TILES)
