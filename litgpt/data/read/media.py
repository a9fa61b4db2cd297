"""Images of rows: in which file or bytes each one is."""

import base64
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from litgpt.data.read.fields import BadRow, check_text

MARK = "\U000f8a35"
"""The private-use character that stands for an image in the content of a message."""
CODES_FOLDER = "image_codes"
"""The folder of the codec in the folder of a model that writes images."""
PNG_URI = "data:image/png;base64,"
"""What a data URI of a PNG file begins with."""
IMAGE_COLUMNS = ("images", "image")
IMAGE_BLOCKS = ("image", "image_url", "input_image")
"""Types of blocks of a content that are images."""
IMAGE_SOURCE_KEYS = ("image", "image_url", "url", "path", "base64", "bytes", "data", "source")
"""Keys of a block, and of an image in it, that hold a path, a data URI, base64 or bytes."""


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
    while isinstance(value, Mapping):  # not by recursion, whose depth a row would set
        if value.get("type") == "base64" or "base64" in value:
            return Medium(data=clean_base64(value.get("data", value.get("base64"))))
        inner = next((value[key] for key in ("bytes", *IMAGE_SOURCE_KEYS) if value.get(key) is not None), None)
        if inner is None:
            raise BadRow("image without a source", ", ".join(map(str, value))[:80])
        value = inner
    if isinstance(value, bytes | bytearray | memoryview):
        return Medium(data=base64.b64encode(value).decode())
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
    text = "".join(check_text(value, "image").split())
    if not text:
        raise BadRow("image without a source", "no base64")
    return text


def parse_image_block(block: Mapping[str, Any]) -> Medium:
    """Parse an image in a content; one without a source is the next of the row's `images`."""
    return parse_image(block) if any(block.get(key) is not None for key in IMAGE_SOURCE_KEYS) else Medium()
