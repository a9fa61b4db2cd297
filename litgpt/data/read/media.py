"""The images of a row: where a message has them, and in which file or bytes each one is."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from litgpt.data.read.fields import BadRow, check_text

if TYPE_CHECKING:
    from litgpt.data.read.message import Message

MARK = "\U000f8a35"
"""The private-use character that stands for an image in the content of a message."""
IMAGE_TAG = "<image>"
"""What stands for the next of a row's `images` in a text."""
IMAGE_COLUMNS = ("images", "image")
IMAGE_BLOCKS = ("image", "image_url", "input_image")
"""Types of blocks of a content that are images."""
SOURCE_KEYS = ("image", "image_url", "url", "path", "base64", "bytes", "data", "source")
"""Keys of a block, and of an image in it, that hold a path, a data URI, base64 or bytes."""
WHITE_SPACE = re.compile(r"\s+")


@dataclass(frozen=True)
class Medium:
    """An image of a row.

    Attributes:
        path: of its file; None for one whose bytes are in the row.
        data: its bytes in base64; both are None for one that the row's `images` hold.
    """

    path: str | None = None
    data: str | None = None

    @property
    def is_known(self) -> bool:
        """Whether it has a source."""
        return self.path is not None or self.data is not None

    @property
    def name(self) -> str:
        """What messages call it."""
        return self.path or "image in the row"


def parse_image(value: Any) -> Medium:
    """Parse the source of an image: a path, a data URI, bytes, or a mapping with one of them.

    Raises:
        BadRow: if it is none of them, or a URL of another machine.
    """
    if isinstance(value, bytes | bytearray | memoryview):
        import base64

        return Medium(data=base64.b64encode(value).decode())
    if isinstance(value, Mapping):
        if value.get("type") == "base64" or "base64" in value:
            return Medium(data=clean_base64(value.get("data", value.get("base64"))))
        inner = next((value[key] for key in ("bytes", *SOURCE_KEYS) if value.get(key) is not None), None)
        if inner is None:
            raise BadRow("image without a source", ", ".join(map(str, value))[:80])
        return parse_image(inner)
    text = check_text(value, "image")
    if text.startswith("data:"):
        return Medium(data=clean_base64(text.partition("base64,")[2]))
    if re.match(r"[a-z][a-z0-9+.-]+://", text, re.IGNORECASE):
        raise BadRow("image at a URL is not supported", f"{text[:80]}; download it, and give its path")
    if not text or "\0" in text:
        raise BadRow("image without a source", repr(text[:80]))
    return Medium(path=text)


def clean_base64(value: Any) -> str:
    """The characters of base64, without line breaks."""
    text = WHITE_SPACE.sub("", check_text(value, "image"))
    if not text:
        raise BadRow("image without a source", "no base64")
    return text


def parse_image_block(block: Mapping[str, Any]) -> Medium:
    """Parse an image in a content; one without a source is the next of the row's `images`."""
    return parse_image(block) if any(block.get(key) is not None for key in SOURCE_KEYS) else Medium()


def list_image_sources(row: Mapping[str, Any]) -> list[Any]:
    """The images beside the text of a row: those of its column `images` or `image`."""
    names = [name for name in IMAGE_COLUMNS if row.get(name)]
    if len(names) > 1:
        raise BadRow("duplicate column", f"{names[0]} and {names[1]} both hold images; remove one")
    if not names:
        return []
    value = row[names[0]]
    return list(value) if isinstance(value, list | tuple) else [value]


def attach_images(messages: Sequence["Message"], sources: Sequence[Any]) -> tuple["Message", ...]:
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


def resolve_paths(messages: Sequence["Message"], folder: Path) -> tuple["Message", ...]:
    """The messages with the paths of their images relative to a folder, which they may not leave.

    Raises:
        BadRow: for a path that does.
    """
    root = folder.resolve()

    def resolve(medium: Medium) -> Medium:
        if medium.path is None:
            return medium
        path = (root / medium.path).resolve()
        if not path.is_relative_to(root):
            raise BadRow("image outside of the folder of the data", f"{medium.path}; set data.media_dir to its folder")
        return replace(medium, path=str(path))

    return tuple(
        replace(message, media=tuple(map(resolve, message.media))) if message.media else message for message in messages
    )
