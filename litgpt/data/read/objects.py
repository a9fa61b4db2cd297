"""Objects in the images of a row: their names and boxes, for which its texts have tags."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from litgpt.data.read.fields import BadRow, check_text, parse_value
from litgpt.data.read.message import Message

OBJECTS_COLUMN = "objects"
NAME_TAG, BOX_TAG = "<ref-object>", "<bbox>"
"""What stands for the next name, and for the next box, in a text."""
BOX_TYPES = ("real", "norm1")
"""Corners in pixels of the image, or as fractions of its sides."""


@dataclass(frozen=True)
class Objects:
    """The objects that the texts of a conversation name, in the order of their tags.

    Attributes:
        names: of objects.
        boxes: the left, top, right and bottom of each, or the two coordinates of a point.
        images: which of the conversation's images each box is in.
        in_pixels: whether boxes are in pixels of the image, turned as its EXIF says; else they are fractions of its
            width and height.
    """

    names: tuple[str, ...]
    boxes: tuple[tuple[float, ...], ...]
    images: tuple[int, ...]
    in_pixels: bool

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> "Objects":
        """The objects of the JSON values that `asdict` gave."""
        boxes = tuple(tuple(box) for box in values["boxes"])
        return cls(tuple(values["names"]), boxes, tuple(values["images"]), values["in_pixels"])


def has_object_tags(messages: Sequence[Message]) -> bool:
    """Whether texts have tags of objects."""
    return any(tag in message.content for message in messages for tag in (NAME_TAG, BOX_TAG))


def parse_objects(value: Any, messages: Sequence[Message], images: int) -> Objects:
    """Parse the column of objects as ms-swift writes it: `ref`, `bbox`, `bbox_type` and `image_id`.

    Args:
        images: the number of images of the messages.

    Raises:
        BadRow: if a box is not one, is not in an image, or there is not one tag for each name and box.
    """
    if not images:
        raise BadRow("objects without an image", f"the column {OBJECTS_COLUMN}")
    value = parse_value(value, OBJECTS_COLUMN)
    if not isinstance(value, Mapping):
        raise BadRow("objects are not a mapping of ref and bbox", repr(value)[:80])
    kind = value.get("bbox_type") or "real"
    if kind not in BOX_TYPES:
        raise BadRow("box of an unknown type", f"{kind!r}"[:40] + f"; use one of {', '.join(BOX_TYPES)}")
    names = tuple(check_text(name, "objects.ref") for name in list_values(value, "ref"))
    boxes = tuple(parse_box(box, is_relative=kind == "norm1") for box in list_values(value, "bbox"))
    places = list_values(value, "image_id")
    places = [*places, *[0] * (len(boxes) - len(places))]
    if len(places) > len(boxes) or any(not isinstance(place, int) or not 0 <= place < images for place in places):
        raise BadRow("box of an image that the row does not have", f"image_id {places}"[:60] + f" of {images} images")
    for tag, items in ((NAME_TAG, names), (BOX_TAG, boxes)):
        tags = sum(message.content.count(tag) for message in messages)
        if tags != len(items):
            raise BadRow(f"not one {tag} for each object", f"{tags} tags, {len(items)} objects")
    return Objects(names, boxes, tuple(places), kind == "real")


def list_values(value: Mapping[str, Any], name: str) -> list[Any]:
    """The values of a field of the objects; empty without it."""
    values = value.get(name)
    if values is not None and not isinstance(values, list | tuple):
        raise BadRow("objects are not lists", f"objects.{name}")
    return list(values or ())


def parse_box(value: Any, *, is_relative: bool) -> tuple[float, ...]:
    """Parse a box or a point, of which only the size of the image can say whether it is in it."""
    numbers = tuple(value) if isinstance(value, list | tuple) else ()
    is_number = [isinstance(number, int | float) and not isinstance(number, bool) for number in numbers]
    if len(numbers) not in (2, 4) or not all(is_number) or not all(map(math.isfinite, numbers)):
        raise BadRow("box that is not two or four numbers", repr(value)[:80])
    if len(numbers) == 4 and not (numbers[0] <= numbers[2] and numbers[1] <= numbers[3]):
        raise BadRow("box whose right or bottom is before its left or top", repr(value)[:80])
    if min(numbers) < 0 or (is_relative and max(numbers) > 1):
        raise BadRow("box outside of its image", repr(value)[:80])
    return numbers
