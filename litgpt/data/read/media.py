"""Media of rows, such as images: in which file or bytes each one is."""

import base64
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NoReturn

from litgpt.data.read.fields import BadRow, check_text

CODES_FOLDER = "image_codes"
"""The folder of the codec in the folder of a model that writes images."""
PNG_URI = "data:image/png;base64,"
"""What a data URI of a PNG file begins with."""
MEDIUM_KEYS = ("url", "path", "base64", "bytes", "data", "source")
"""Keys of a block, and of a medium in it, that hold a path, a data URI, base64 or bytes, beside those of its kind."""


@dataclass(frozen=True)
class MediumKind:
    """How rows have media of one kind.

    Attributes:
        mark: the private-use character that stands for one in the content of a message.
        tag: what stands for the next one of a row's columns in a text.
        columns: of rows, that hold them beside the text.
        blocks: types of blocks of a content.
        keys: of a block that hold its source, in the order in which they are looked for.
    """

    mark: str
    tag: str
    columns: tuple[str, ...]
    blocks: tuple[str, ...]
    keys: tuple[str, ...]


MEDIA_KINDS = {
    name: MediumKind(
        mark=mark,
        tag=f"<{name}>",
        columns=(f"{name}s", name),
        blocks=(name, f"{name}_url", f"input_{name}"),
        keys=(name, f"{name}_url", f"input_{name}", *MEDIUM_KEYS),
    )
    for name, mark in {"image": "\U000f8a35", "video": "\U000f8a36", "audio": "\U000f8a37"}.items()
}
"""The kinds of media, by name."""
KINDS_OF_MARKS = {kind.mark: name for name, kind in MEDIA_KINDS.items()}
KINDS_OF_BLOCKS = {block: name for name, kind in MEDIA_KINDS.items() for block in kind.blocks}
MARK = MEDIA_KINDS["image"].mark
MARKS = re.compile(f"[{''.join(KINDS_OF_MARKS)}]")
"""Finds the marks in a content."""
WEB_URL = re.compile("https?://", re.IGNORECASE)
"""Matches the beginning of URLs that may be fetched."""
LONGEST_NAME = 256
"""Characters of a text from which on it is no path if it is base64: names of files have fewer, and have a dot."""


@dataclass(frozen=True)
class Medium:
    """An image, a video or a sound of a row.

    Attributes:
        path: of its file; None for one whose bytes are in the row.
        data: its bytes in base64; both are None for one that a column of the row holds, or that is not fetched yet.
        kind: one of `MEDIA_KINDS`.
        url: where it is, or was fetched from.
        start, stop: the samples of a sound that it is a piece of, at the rate of the model; None for all of it.
        has_track: whether the sound track of a video is read with its frames; of a sound, whether it is such a track.
    """

    path: str | None = None
    data: str | None = None
    kind: str = "image"
    url: str | None = None
    start: int = 0
    stop: int | None = None
    has_track: bool = False

    @property
    def is_known(self) -> bool:
        """Whether it has a source."""
        return self.path is not None or self.data is not None or self.url is not None

    @property
    def samples(self) -> range | None:
        """The samples of a sound that it is a piece of; None for all of it."""
        return None if self.stop is None else range(self.start, self.stop)

    @property
    def whole(self) -> "Medium":
        """The sound that it is a piece of; itself if it is none."""
        return self if self.stop is None else replace(self, start=0, stop=None)

    @property
    def name(self) -> str:
        """What messages call it."""
        return self.url or self.path or f"{self.kind} in the row"


def parse_medium(value: Any, kind: str) -> Medium:
    """Parse the source of a medium: a path, a URL, a data URI, base64, bytes, or a mapping with one of them.

    Raises:
        BadRow: if it is none of them, or a URL of a scheme that is not fetched.
    """
    while isinstance(value, Mapping):  # not by recursion, whose depth a row would set
        if value.get("type") == "base64" or "base64" in value or {"data", "format"} <= value.keys():
            return Medium(data=clean_base64(value.get("data", value.get("base64")), kind), kind=kind)
        keys = ("bytes", *MEDIA_KINDS[kind].keys)
        inner = next((value[key] for key in keys if value.get(key) is not None), None)
        if inner is None:
            raise BadRow(f"{kind} without a source", ", ".join(map(str, value))[:80])
        value = inner
    if isinstance(value, bytes | bytearray | memoryview):
        return Medium(data=base64.b64encode(value).decode(), kind=kind)
    text = check_text(value, kind)
    if text.startswith("data:"):
        return Medium(data=clean_base64(text.partition("base64,")[2], kind), kind=kind)
    if WEB_URL.match(text):
        return Medium(url=text, kind=kind)
    if re.match(r"[a-z][a-z0-9+.-]+://", text, re.IGNORECASE):
        refuse_url(Medium(url=text, kind=kind))
    if re.fullmatch(f"[A-Za-z0-9+/\\s]{{{LONGEST_NAME},}}={{0,2}}", text):
        return Medium(data=clean_base64(text, kind), kind=kind)
    if not text or "\0" in text:
        raise BadRow(f"{kind} without a source", repr(text[:80]))
    return Medium(path=text, kind=kind)


def refuse_url(medium: Medium, cure: str = "download it, and give its path") -> NoReturn:
    """Raise the BadRow of a medium at a URL that is not fetched."""
    raise BadRow(f"{medium.kind} at a URL is not supported", f"{medium.name[:80]}; {cure}")


def clean_base64(value: Any, kind: str) -> str:
    """The characters of base64, without line breaks."""
    text = "".join(check_text(value, kind).split())
    if not text:
        raise BadRow(f"{kind} without a source", "no base64")
    return text


def parse_medium_block(block: Mapping[str, Any], kind: str) -> Medium:
    """Parse a medium in a content; one without a source is the next of the row's column."""
    has_source = any(block.get(key) is not None for key in MEDIA_KINDS[kind].keys)
    return parse_medium(block, kind) if has_source else Medium(kind=kind)
