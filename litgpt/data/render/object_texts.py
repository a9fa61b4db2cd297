"""Write the names and boxes of objects into texts, in the form that a model was trained with."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from litgpt.data.media.picture_sizes import Size
from litgpt.data.read.conversation import Conversation
from litgpt.data.read.fields import BadRow
from litgpt.data.read.objects import BOX_TAG, NAME_TAG, Objects

USUAL_FORM = {"unit": "thousandth", "corner": "({x},{y})", "between": ",", "box": "[{corners}]", "name": "{name}"}
"""That of a family without one of its own, which is ms-swift's."""


def write_objects(
    conversation: Conversation, form: Mapping[str, Any] | None, measure: Callable[[int], tuple[Size, Size]]
) -> Conversation:
    """The conversation with the names and boxes of its objects in place of their tags.

    Args:
        form: `TowerShape.objects`.
        measure: the size of an image, by its number, and the size that it is resized to.

    Raises:
        BadRow: if a box is not in its image, or the image cannot be read.
    """
    objects = conversation.objects
    if objects is None:
        return conversation
    form = form or USUAL_FORM
    texts = {
        NAME_TAG: iter([form["name"].format(name=name) for name in objects.names]),
        BOX_TAG: iter(list_boxes(objects, form, measure)),
    }
    tags = re.compile("|".join(map(re.escape, texts)))
    messages = (
        replace(message, content=tags.sub(lambda match: next(texts[match[0]]), message.content))
        for message in conversation.messages
    )
    return replace(conversation, messages=tuple(messages), objects=None)


def list_boxes(objects: Objects, form: Mapping[str, Any], measure: Callable[[int], tuple[Size, Size]]) -> Sequence[str]:
    """The texts of all boxes; arguments and errors as for `write_objects`."""
    sizes = {image: measure(image) for image in set(objects.images)}
    texts = []
    for box, image in zip(objects.boxes, objects.images, strict=True):
        (height, width), (new_height, new_width) = sizes[image]
        sides = (width, height) if objects.in_pixels else (1, 1)
        fractions = [number / sides[index % 2] for index, number in enumerate(box)]
        if max(fractions) > 1:
            raise BadRow("box outside of its image", f"{list(box)} in {width} x {height} pixels")
        scales = {"thousandth": (1000, 1000), "bin": (1024, 1024), "pixel": (new_width, new_height)}[form["unit"]]
        most = 1023 if form["unit"] == "bin" else max(scales)
        numbers = [min(round(fraction * scales[index % 2]), most) for index, fraction in enumerate(fractions)]
        corners = [form["corner"].format(x=x, y=y) for x, y in zip(numbers[::2], numbers[1::2], strict=True)]
        texts.append(form["box"].format(corners=form["between"].join(corners)))
    return texts
