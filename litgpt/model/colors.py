"""How the values of pixels are normalized, in the files of published processors."""

import math
from pathlib import Path
from typing import Any

from litgpt.errors import UserError


def check_color(path: Path, key: str, value: Any) -> tuple[float, ...]:
    """The mean or the deviation of each of three channels.

    Args:
        path: of the file.

    Raises:
        UserError: if it is none.
    """
    numbers = value if isinstance(value, list | tuple) else ()
    is_color = len(numbers) == 3 and all(type(number) in (int, float) and math.isfinite(number) for number in numbers)
    if not is_color or (key == "image_std" and 0 in numbers):
        raise UserError(f"{path}: {key}: {value} is not supported; use three numbers, e.g. [0.5, 0.5, 0.5]")
    return tuple(map(float, numbers))


def check_scale(path: Path, value: Any) -> float:
    """The factor on values of 0 to 255, `rescale_factor`.

    Raises:
        UserError: if it is none.
    """
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise UserError(f"{path}: rescale_factor: {value} is not supported; use e.g. {1 / 255}")
    return float(value)
