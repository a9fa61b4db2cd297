"""Messages with a mark in the place of each image."""

from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from litgpt.data.media.pictures import open_picture
from litgpt.data.read.fields import BadRow
from litgpt.data.read.media import IMAGE_BLOCKS, Medium
from litgpt.data.read.message import Message, parse_content
from litgpt.data.read.row_images import IMAGE_TAG, attach_images, resolve_image_paths
from litgpt.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

ChatMessages = Sequence[Mapping[str, Any]]


def mark_images(
    messages: ChatMessages, sources: Sequence[Any], folder: Path | None = None
) -> tuple[list[Mapping[str, Any]], list[Medium]]:
    """The messages with a mark in the place of each image, and the images in order; as in the rows of training.

    Args:
        messages: with blocks of images, or tags for `sources`.
        sources: images without a tag are before the text of the first message that is not the system's.
        folder: that paths are relative to and may not leave; None for any paths.

    Raises:
        UserError: if an image has no source that can be used.
    """
    if not sources and not any(has_images(message.get("content")) for message in messages):
        return list(messages), []
    system = len(messages) > 1 and messages[0].get("role") in ("system", "developer")
    try:
        attached = attach_images([parse_images(message) for message in messages[system:]], sources)
        attached = attached if folder is None else resolve_image_paths(attached, folder)
    except BadRow as error:
        raise UserError(f"image: {error}") from None
    marked = [
        message if message.get("content") is None else {**message, "content": other.content}
        for message, other in zip(messages[system:], attached, strict=True)
    ]
    return [*messages[:system], *marked], [medium for message in attached for medium in message.media]


def has_images(content: Any) -> bool:
    """Whether a content is a list with an image."""
    return isinstance(content, list | tuple) and any(
        isinstance(block, Mapping) and block.get("type") in IMAGE_BLOCKS for block in content
    )


def parse_images(message: Mapping[str, Any]) -> Message:
    """Role and content of a message, with its images.

    Raises:
        BadRow: if the content has blocks that are neither text nor images.
    """
    role, content = str(message.get("role")), message.get("content")
    if content is None:
        return Message(role, "")
    parsed = parse_content(content, role)
    if len(parsed) != 1 or parsed[0].role != role or parsed[0].fields:
        raise BadRow("content with images and other blocks is not supported", "use text and images")
    return parsed[0]


def build_content(text: str, sources: Sequence[str]) -> str | list[dict[str, str]]:
    """The content of a message with images, as blocks, in the place of its tags or before the text; a text without.

    Raises:
        UserError: if there are more tags than images.
    """
    if not sources:
        return text
    parts = text.split(IMAGE_TAG)
    if len(parts) - 1 > len(sources):
        raise UserError(f"image: {len(parts) - 1} tags {IMAGE_TAG}, but {len(sources)} images; give one for each tag")
    blocks = [{"type": "image", "path": source} for source in sources]
    content, rest = blocks[: len(sources) - len(parts) + 1], blocks[len(sources) - len(parts) + 1 :]
    for number, part in enumerate(parts):
        content += [{"type": "text", "text": part}] if part else []
        content += rest[number : number + 1]
    return content


def list_image_values(images: Any) -> list[Any]:
    """The sources of images as rows have them, of one or a list of paths, URIs of data, bytes and images of Pillow.

    Raises:
        UserError: for another type.
    """
    values = list(images) if isinstance(images, list | tuple) else [] if images is None else [images]
    return [to_row_value(value) for value in values]


def list_images_by_prompt(images: Any, prompts: int) -> list[list[Any]]:
    """The sources of images of several prompts.

    Raises:
        UserError: if there is not one list for each.
    """
    if images is None:
        return [[]] * prompts
    if not isinstance(images, list | tuple) or len(images) != prompts:
        raise UserError(f"images: is not a list of {prompts} lists, one for each prompt; use [] for one without images")
    return [list_image_values(values) for values in images]


def to_row_value(image: Any) -> Any:
    """The source of an image as a row has it."""
    from PIL import Image

    if isinstance(image, Path):
        return str(image)
    if isinstance(image, str | bytes | bytearray | memoryview):
        return image
    if isinstance(image, Image.Image):
        return write_bitmap(image)
    raise UserError(f"images: {type(image).__name__} is not an image; give a path, the bytes of a file, or a PIL image")


def write_bitmap(image: "Image") -> bytes:
    """The bytes of a file with the colors of an image, as a model sees them."""
    from PIL import Image

    buffer = BytesIO()
    Image.fromarray(open_picture(image).permute(1, 2, 0).numpy()).save(buffer, "BMP")
    return buffer.getvalue()
