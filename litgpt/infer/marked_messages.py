"""Messages with a mark in the place of each image, video or sound."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from litgpt.data.media.pictures import open_picture
from litgpt.data.read.fields import BadRow
from litgpt.data.read.media import KINDS_OF_BLOCKS, MEDIA_KINDS, Medium
from litgpt.data.read.message import Message, parse_content
from litgpt.data.read.row_media import MediaSources, MediaStep, attach_media, resolve_media
from litgpt.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

ChatMessages = Sequence[Mapping[str, Any]]


def mark_media(
    messages: ChatMessages, sources: MediaSources, folder: Path | None = None, steps: Sequence[MediaStep] = ()
) -> tuple[list[Mapping[str, Any]], list[Medium]]:
    """The messages with a mark in the place of each medium, and the media in order; as in the rows of training.

    Args:
        messages: with blocks of media, or tags for `sources`.
        sources: media without a tag are before the text of the first message that is not the system's.
        folder: that paths are relative to and may not leave; None for any paths.
        steps: change the messages when their media have files, as in `resolve_media`.

    Raises:
        UserError: if one has no source that can be used.
    """
    kinds = [kind for kind, values in sources.items() if values]
    kinds += [kind for message in messages for kind in list_media_kinds(message.get("content"))]
    if not kinds:
        return list(messages), []
    system = len(messages) > 1 and messages[0].get("role") in ("system", "developer")
    try:
        attach_media([parse_media(message) for message in messages[:system]], {})  # no text has a mark of its own
        attached = attach_media([parse_media(message) for message in messages[system:]], sources)
        attached = resolve_media(attached, folder, steps=steps)
    except BadRow as error:
        raise UserError(f"{name_kinds(kinds)}: {error}") from None
    marked = [
        message if message.get("content") is None else {**message, "content": other.content}
        for message, other in zip(messages[system:], attached, strict=True)
    ]
    return [*messages[:system], *marked], [medium for message in attached for medium in message.media]


def name_kinds(kinds: Iterable[str]) -> str:
    """The kinds of the media of a prompt, each once, for an error about one of them."""
    return " or ".join(dict.fromkeys(kinds))


def list_media_kinds(content: Any) -> list[str]:
    """The kinds of the media of a content that is a list."""
    blocks = content if isinstance(content, list | tuple) else ()
    types = (str(block.get("type")) for block in blocks if isinstance(block, Mapping))
    return [KINDS_OF_BLOCKS[kind] for kind in types if kind in KINDS_OF_BLOCKS]


def parse_media(message: Mapping[str, Any]) -> Message:
    """Role and content of a message, with its media.

    Raises:
        BadRow: if the content has blocks that are neither text nor media.
    """
    role, content = str(message.get("role")), message.get("content")
    if content is None:
        return Message(role, "")
    parsed = parse_content(content, role)
    if len(parsed) != 1 or parsed[0].role != role or parsed[0].fields:
        raise BadRow("content with media and other blocks is not supported", "use text, images, videos and sounds")
    return parsed[0]


def build_content(text: str, sources: Mapping[str, Sequence[str]]) -> str | list[dict[str, str]]:
    """The content of a message with media, as blocks, in the place of its tags or before the text; a text without.

    Args:
        sources: the paths of media, by kind.

    Raises:
        UserError: if there are more tags of a kind than media.
    """
    kinds = {form.tag: kind for kind, form in MEDIA_KINDS.items() if sources.get(kind)}
    if not kinds:
        return text
    parts = re.split(f"({'|'.join(map(re.escape, kinds))})", text)
    content, waiting = list[dict[str, str]](), dict[str, Iterator[dict[str, str]]]()
    for tag, kind in kinds.items():
        blocks, tags = [{"type": kind, "path": path} for path in sources[kind]], parts.count(tag)
        if tags > len(blocks):
            raise UserError(f"{kind}: {tags} tags {tag}, but {len(blocks)} {kind}s; give one for each tag")
        content += blocks[: len(blocks) - tags]
        waiting[tag] = iter(blocks[len(blocks) - tags :])
    content += [next(waiting[part]) if part in waiting else {"type": "text", "text": part} for part in parts if part]
    return content


def list_given_media(media: Mapping[str, Any]) -> dict[str, list[Any]]:
    """The sources of media as rows have them, by kind.

    Args:
        media: for each kind, one or a list of paths, URIs of data and bytes, and for images those of Pillow; or None.

    Raises:
        UserError: for another type.
    """
    lists = {
        kind: list(given) if isinstance(given, list | tuple) else [given]
        for kind, given in media.items()
        if given is not None
    }
    return {kind: [to_row_value(value, kind) for value in values] for kind, values in lists.items()}


def list_given_by_prompt(media: Mapping[str, Any], prompts: int) -> list[dict[str, list[Any]]]:
    """The sources of media of several prompts.

    Args:
        media: for each kind, a list as `list_given_media` takes it for each prompt; or None.

    Raises:
        UserError: if there is not one list for each.
    """
    given = {kind: lists for kind, lists in media.items() if lists is not None}
    for kind, lists in given.items():
        if not isinstance(lists, list | tuple) or len(lists) != prompts:
            key, cure = f"{kind}s", f"use [] for one without {kind}s"
            raise UserError(f"{key}: is not a list of {prompts} lists, one for each prompt; {cure}")
    return [list_given_media({kind: lists[number] for kind, lists in given.items()}) for number in range(prompts)]


def to_row_value(value: Any, kind: str) -> Any:
    """The source of a medium as a row has it."""
    from PIL import Image

    if isinstance(value, Path):
        return str(value)
    if isinstance(value, str | bytes | bytearray | memoryview):
        return value
    if kind != "image":
        raise UserError(f"{kind}s: {type(value).__name__} is no {kind}; give a path, or the bytes of a file")
    if isinstance(value, Image.Image):
        return write_bitmap(value)
    raise UserError(f"images: {type(value).__name__} is not an image; give a path, the bytes of a file, or a PIL image")


def write_bitmap(image: "Image") -> bytes:
    """The bytes of a file with the colors of an image, as a model sees them."""
    from PIL import Image

    buffer = BytesIO()
    Image.fromarray(open_picture(image).permute(1, 2, 0).numpy()).save(buffer, "BMP")
    return buffer.getvalue()
