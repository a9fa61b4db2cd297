"""The images of a row at their places in its messages."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from litgpt.data.read.fields import BadRow
from litgpt.data.read.media import IMAGE_COLUMNS, MARK, Medium, parse_image
from litgpt.data.read.message import Message

IMAGE_TAG = "<image>"
"""What stands for the next of a row's `images` in a text."""


def list_image_sources(row: Mapping[str, Any]) -> list[Any]:
    """The images beside the text of a row: those of its column `images` or `image`."""
    names = [name for name in IMAGE_COLUMNS if row.get(name)]
    if len(names) > 1:
        raise BadRow("duplicate column", f"{names[0]} and {names[1]} both hold images; remove one")
    if not names:
        return []
    value = row[names[0]]
    return list(value) if isinstance(value, list | tuple) else [value]


def attach_images(messages: Sequence[Message], sources: Sequence[Any]) -> tuple[Message, ...]:
    """Put the images of a row in the place of the tags in its messages, the k-th in that of the k-th.

    Those without a tag are before the text of the first message.

    Args:
        sources: as `list_image_sources` returns them; without any, a tag is text.

    Raises:
        BadRow: if there are more tags than images.
    """
    for message in messages:
        if message.content.count(MARK) != len(message.media):
            raise BadRow("text with a character that stands for an image", repr(MARK))
    images = [parse_image(source) for source in sources]
    tag = re.compile(f"{MARK}|{re.escape(IMAGE_TAG)}" if images else MARK)
    places = sum(len(tag.findall(message.content)) for message in messages)
    places -= sum(medium.is_known for message in messages for medium in message.media)
    if places > len(images):
        raise BadRow("more places for images than images", f"{places} places, {len(images)} images")
    if images[places:]:
        extra = images[: len(images) - places]
        first = messages[0]
        content = MARK * len(extra) + first.content
        messages = [replace(first, content=content, media=(*extra, *first.media)), *messages[1:]]
        images = images[len(extra) :]
    rest, attached = iter(images), []
    for message in messages:
        known = iter(message.media)
        media = [next(known) if match == MARK else Medium() for match in tag.findall(message.content)]
        media = [medium if medium.is_known else next(rest) for medium in media]
        attached.append(replace(message, content=tag.sub(MARK, message.content), media=tuple(media)))
    return tuple(attached)


def resolve_image_paths(messages: Sequence[Message], folder: Path) -> tuple[Message, ...]:
    """The messages with the paths of their images relative to a folder, which they may not leave.

    Raises:
        BadRow: for a path that does.
    """
    root = folder.resolve()

    def resolve(medium: Medium) -> Medium:
        if medium.path is None:
            return medium
        try:
            path = (root / medium.path).resolve()
        except (OSError, RuntimeError):  # the latter before Python 3.13
            raise BadRow("image not found", f"{medium.path}: links that lead to themselves") from None
        if not path.is_relative_to(root):
            raise BadRow("image outside of the folder of the data", f"{medium.path}; set data.media_dir to its folder")
        return replace(medium, path=str(path))

    return tuple(
        replace(message, media=tuple(map(resolve, message.media))) if message.media else message for message in messages
    )
