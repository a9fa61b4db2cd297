"""The sizes to which images are resized before they are cut into patches, by the rules of published processors."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from litgpt.errors import UserError
from litgpt.mappings import drop_nulls

Size = tuple[int, int]
"""Height and width in pixels."""
LONGEST_SIDE = 4096  # of an image of Idefics 3 before it is cut into tiles
SIZE_KEYS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("square", "part", "padded"), ("height", "width")),
    **dict.fromkeys(("area", "volume", "frame"), ("shortest_edge", "longest_edge")),
    **dict.fromkeys(("long_side", "within"), ("longest_edge",)),
    "short_side": ("shortest_edge",),
}
"""The keys of the size that each rule reads, of images and of videos."""
NARROWEST = 200  # long side over short side from which on Qwen2-VL takes no images


def fit_square(_size: Size, limits: Mapping[str, int], _unit: int) -> Size:
    """The given height and width (SigLIP)."""
    return limits["height"], limits["width"]


def fit_short_side(size: Size, limits: Mapping[str, int], _unit: int) -> Size:
    """The short side at `shortest_edge`, the long one in proportion, rounded down (CLIP)."""
    short, long = min(size), max(size)
    longer = int(limits["shortest_edge"] * long / short)
    return (longer, limits["shortest_edge"]) if size[0] > size[1] else (limits["shortest_edge"], longer)


def fit_area(size: Size, limits: Mapping[str, float], unit: int) -> Size:
    """Both sides near their own at multiples of `unit`, the area within `shortest_edge` to `longest_edge` (Qwen2-VL).

    Raises:
        UserError: if the image is too narrow.
    """
    height, width = size
    if max(size) > NARROWEST * min(size):
        raise UserError(
            f"image of {height} x {width} pixels: too narrow; the ratio of its sides is at most {NARROWEST}"
        )
    least, most = limits["shortest_edge"], limits["longest_edge"]
    rounded = round(height / unit) * unit, round(width / unit) * unit
    if rounded[0] * rounded[1] > most:
        shrink = math.sqrt(height * width / most)
        return max(unit, math.floor(height / shrink / unit) * unit), max(unit, math.floor(width / shrink / unit) * unit)
    if rounded[0] * rounded[1] < least:
        growth = math.sqrt(least / (height * width))
        return math.ceil(height * growth / unit) * unit, math.ceil(width * growth / unit) * unit
    return rounded


def fit_frames(size: Size, limits: Mapping[str, int], unit: int) -> Size:
    """As `fit_area` for the pixels of all `frames` of a patch, and images with sides of `unit` or more (GLM-4.1V).

    Raises:
        UserError: if the image is too narrow.
    """
    growth = max(unit / side for side in size)
    height, width = (int(side * growth) for side in size) if growth > 1 else size
    shares = {key: limits[key] / limits["frames"] for key in ("shortest_edge", "longest_edge")}
    return fit_area((height, width), shares, unit)


def fit_long_side(size: Size, limits: Mapping[str, int], _unit: int) -> Size:
    """The long side at `longest_edge`, the short one in proportion and even; at most 4096 pixels (Idefics 3)."""
    longest = limits["longest_edge"]
    is_wide, ratio = size[1] >= size[0], size[1] / size[0]
    short = int(longest / ratio) if is_wide else int(longest * ratio)
    short = max(short + short % 2, 1)
    if longest > LONGEST_SIDE:
        ratio = longest / short if is_wide else short / longest
        longest = LONGEST_SIDE
        short = max(int(longest / ratio) if is_wide else int(longest * ratio), 1)
    return (short, longest) if is_wide else (longest, short)


def fit_padded(size: Size, limits: Mapping[str, int], _unit: int) -> Size:
    """The long side at `height`, the short one in proportion, both at least `least`; a square is around it (Janus)."""
    height, width = (max(round(side * (limits["height"] / max(size))), limits["least"]) for side in size)
    return height, width


def fit_tiles(size: Size, tile: int) -> Size:
    """Both sides up to multiples of a tile, the long one first and the short one in proportion to it (Idefics 3)."""
    is_wide, ratio = size[1] >= size[0], size[1] / size[0]
    longer = math.ceil(max(size) / tile) * tile
    shorter = math.ceil(int(longer / ratio if is_wide else longer * ratio) / tile) * tile
    return (shorter, longer) if is_wide else (longer, shorter)


def fit_within(size: Size, limits: Mapping[str, int], unit: int) -> Size:
    """The long side at most `longest_edge`, the short one in proportion, both up to multiples of `unit` (Pixtral)."""
    longest = limits["longest_edge"]
    ratio = max(1.0, size[0] / longest, size[1] / longest)
    height, width = (math.ceil(math.floor(side / ratio) / unit) * unit for side in size)
    return height, width


def find_tile_grid(size: Size, tile: Size, least: int, most: int) -> tuple[int, int]:
    """The rows and columns of tiles, `least` to `most` in all, nearest to the image's ratio of sides (InternVL).

    Of grids that are equally near it is the largest of those that half cover the image.
    """
    sides = range(1, most + 1)
    grids = [(rows, columns) for columns in sides for rows in sides if least <= rows * columns <= most]
    best, best_distance = (1, 1), math.inf
    for rows, columns in sorted(grids, key=math.prod):
        distance = abs(size[1] / size[0] - columns / rows)
        is_covered = math.prod(size) > 0.5 * math.prod(tile) * rows * columns
        if distance < best_distance or (distance == best_distance and is_covered):
            best, best_distance = (rows, columns), distance
    return best


def read_sides(path: Path, key: str, value: Any, names: Sequence[str]) -> dict[str, int]:
    """The sides, or areas, in a setting of a processor.

    Args:
        path: of its file.
        key: of the setting.
        names: of those that it must have; others are not read.

    Raises:
        UserError: if one is missing, or no positive integer.
    """
    sides: dict[str, Any] = {name: value.get(name) for name in names} if isinstance(value, Mapping) else {}
    if not sides or not all(type(side) is int and side > 0 for side in sides.values()):
        raise UserError(f"{path}: {key}: {value} is not supported; set {' and '.join(names)}, in pixels")
    return sides


def read_limits(path: Path, rule: str, settings: Mapping[str, Any]) -> tuple[str, dict[str, int]]:
    """The rule of sizes in the settings of a processor, and its limits.

    Args:
        path: of their file.
        rule: of the processor; the same with a height is that of squares.

    Raises:
        UserError: if they are not supported.
    """
    size = settings["size"]
    if rule == "short_side" and isinstance(size, Mapping) and "height" in size:
        rule = "square"
    if rule == "area" and isinstance(size, Mapping):  # older files have these keys, which come first, beside the size
        older = {"shortest_edge": settings.get("min_pixels"), "longest_edge": settings.get("max_pixels")}
        size = {**size, **drop_nulls(older)}
    limits = read_sides(path, "size", size, SIZE_KEYS[rule])
    if rule == "volume":
        return rule, {**limits, "frames": check_most(path, "temporal_patch_size", settings["temporal_patch_size"])}
    if rule == "padded":
        if limits["height"] != limits["width"]:
            raise UserError(f"{path}: size: {size} is not supported; use the same height and width")
        least = check_most(path, "min_size", settings["min_size"], limits["height"])
        return rule, {"height": limits["height"], "least": least}
    return rule, limits


def check_most(path: Path, key: str, value: Any, most: int = 256) -> int:
    """A setting of a processor that is a number from 1 to `most`.

    Raises:
        UserError: if it is not.
    """
    if type(value) is not int or not 1 <= value <= most:
        raise UserError(f"{path}: {key}: {value} is not supported; use 1 to {most}")
    return value


def check_growth(size: Size, new: Size) -> None:
    """Check that an image is not made larger than the largest one that is decoded, as a narrow one would be.

    Raises:
        UserError: if it would be.
    """
    from PIL import Image

    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and math.prod(new) > limit:
        raise UserError(
            f"image of {size[0]} x {size[1]} pixels: it would become one of {new[0]} x {new[1]}, more than {limit:,} "
            "pixels; use one whose long side is shorter"
        )


SIZE_RULES: dict[str, Callable[[Size, Mapping[str, int], int], Size]] = {
    "square": fit_square,
    "short_side": fit_short_side,
    "area": fit_area,
    "volume": fit_frames,
    "long_side": fit_long_side,
    "within": fit_within,
    "padded": fit_padded,
}
