"""The contents of the messages of a request: texts, and images as data URLs."""

import base64
import binascii
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from litgpt.data.media.pictures import read_picture_size
from litgpt.errors import UserError
from litgpt.files import find_surrogate
from litgpt.infer.server.errors import ApiError


@dataclass(frozen=True)
class ImageLimits:
    """How many images a request may have, and how many pixels each."""

    count: int
    pixels: int


def read_contents(messages: Sequence[dict[str, Any]], limits: ImageLimits) -> None:
    """Replace the contents of messages by texts, or by lists of texts and images where there are images.

    Raises:
        ApiError: for a part of another kind, or an image that is not a data URL, too large, or one too many.
    """
    count = 0
    for message in messages:
        content = message.get("content")
        content = content if isinstance(content, list) else [{"type": "text", "text": content or ""}]
        parts = [read_part(part, limits) for part in content]
        images = sum(not isinstance(part, str) for part in parts)
        count += images
        message["content"] = parts if images else "".join(map(str, parts))
    if count > limits.count:
        raise refuse(f"{count} images are more than max_images: {limits.count}; send fewer")


def refuse(message: str) -> ApiError:
    """The error of a content."""
    return ApiError(400, f"messages: {message}", param="messages")


def read_part(part: dict[str, Any], limits: ImageLimits) -> Any:
    """A text, or an image as a block with its bytes."""
    kind = part.get("type")
    if kind == "text" and isinstance(part.get("text"), str):
        return check_surrogates(part["text"])
    if kind != "image_url":
        raise refuse(f"content of type {str(kind)[:100]!r} is not supported; use text or image_url")
    image = part.get("image_url")
    image = image if isinstance(image, dict) else {}
    url = image.get("url")
    if not isinstance(url, str):
        raise refuse('image_url is not an object with a url; send {"url": "data:image/png;base64,..."}')
    if image.get("detail", "auto") != "auto":
        raise refuse(f"image_url.detail: {str(image['detail'])[:40]!r} is not supported; leave it out")
    if not url.startswith("data:"):
        raise refuse(f"image_url.url: {url[:40]!r} is not fetched; send the image itself: data:image/png;base64,...")
    data = decode_base64(url)
    try:
        height, width = read_picture_size(data)
    except UserError as error:
        raise refuse(f"image_url.url: {error}") from None
    if height * width > limits.pixels:
        raise refuse(f"image of {width} x {height} pixels: more than max_image_pixels: {limits.pixels}; send a smaller")
    return {"type": "image", "bytes": data}


def decode_base64(url: str) -> bytes:
    """The bytes of a data URL."""
    head, _, text = url.partition(",")
    if not head.endswith(";base64"):
        raise refuse("image_url.url: is not base64; send data:image/png;base64,...")
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise refuse(f"image_url.url: not base64 ({error}); encode the bytes of the file") from None


def check_surrogates(text: str) -> str:
    """The same text, if UTF-8 can encode it."""
    if (position := find_surrogate(text)) is not None:
        raise refuse(f"a text is not UTF-8 at character {position + 1}; give it in UTF-8")
    return text
