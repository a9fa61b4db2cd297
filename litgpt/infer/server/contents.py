"""The contents of the messages of a request: texts, and images, videos and sounds as URLs or base64."""

import base64
import binascii
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from litgpt.data.media.containers import read_video_header
from litgpt.data.media.errors import MissingExtraError
from litgpt.data.media.pictures import read_picture_size
from litgpt.data.media.sounds import read_sound_formats
from litgpt.data.read.media import WEB_URL
from litgpt.errors import UserError
from litgpt.files import find_surrogate
from litgpt.infer.server.errors import ApiError

INPUT_FORMATS = {name: name for name in ("wav", "mp3", "flac", "ogg", "aac", "aiff", "webm")}
INPUT_FORMATS |= {"opus": "ogg", "m4a": "m4a", "mp4": "mp4"}
"""FFmpeg's name for the file of each `format` of an `input_audio`."""


@dataclass(frozen=True)
class MediaLimits:
    """How many media of each kind a request may have, and how many pixels an image, and all frames of a video."""

    counts: Mapping[str, int]
    image_pixels: int
    video_pixels: int


@dataclass(frozen=True)
class MediaPart:
    """A type of the parts of a content.

    Attributes:
        kind: of its medium.
        keys: of its object, all of texts; the first is that of a URL, `url`, or of base64, `data`.
        example: of the text at the first key.
    """

    kind: str
    keys: tuple[str, ...]
    example: str


MEDIA_PARTS = {
    "image_url": MediaPart("image", ("url",), "data:image/png;base64,..."),
    "video_url": MediaPart("video", ("url",), "data:video/mp4;base64,..."),
    "audio_url": MediaPart("audio", ("url",), "data:audio/wav;base64,..."),
    "input_audio": MediaPart("audio", ("data", "format"), "UklGR..."),
}
"""OpenAI's parts, and those of the same form that vLLM and transformers take."""


@dataclass(frozen=True)
class RequestMedium:
    """A medium of a request.

    Attributes:
        data: the bytes of its file.
        where: the key of its part that it was at, for errors.
        format: of its file, as the request says; None if it does not say so.
    """

    kind: str
    data: bytes
    where: str
    format: str | None


def find_urls(contents: Iterable[Any], limits: MediaLimits) -> list[str]:
    """The http and https URLs of contents, each once.

    Raises:
        ApiError: if there are more media of a kind than a request may have.
    """
    parts = [part for content in contents if isinstance(content, list) for part in content]
    media = [(name, part) for part in parts if (name := str(part.get("type"))) in MEDIA_PARTS]
    check_counts([MEDIA_PARTS[name].kind for name, _ in media], limits)
    given = [part.get(name) for name, part in media if MEDIA_PARTS[name].keys[0] == "url"]
    urls = [each.get("url") for each in given if isinstance(each, dict)]
    return list(dict.fromkeys(url for url in urls if isinstance(url, str) and WEB_URL.match(url)))


def parse_contents(messages: Sequence[dict[str, Any]], files: Mapping[str, bytes]) -> list[RequestMedium]:
    """Replace the contents of messages by texts, or by lists of texts and media where there are media.

    Args:
        files: the bytes of those at URLs that were fetched.

    Returns:
        The media, in order, for `check_request_media`.

    Raises:
        ApiError: for a part of another kind, or a medium that is not a data URL, base64 or fetched.
    """
    listed: list[RequestMedium] = []
    for message in messages:
        content = message.get("content")
        content = content if isinstance(content, list) else [{"type": "text", "text": content or ""}]
        parts = [parse_part(part, files) for part in content]
        media = [part for part in parts if isinstance(part, RequestMedium)]
        blocks = [part if isinstance(part, str) else {"type": part.kind, "bytes": part.data} for part in parts]
        message["content"] = blocks if media else "".join(map(str, blocks))
        listed += media
    return listed


def refuse(message: str) -> ApiError:
    """The error of a content."""
    return ApiError(400, f"messages: {message}", param="messages")


def parse_part(part: dict[str, Any], files: Mapping[str, bytes]) -> str | RequestMedium:
    """A text, or a medium with its bytes."""
    name = str(part.get("type"))
    if name == "text" and isinstance(part.get("text"), str):
        return check_surrogates(part["text"])
    if name not in MEDIA_PARTS:
        names = ", ".join(["text", *MEDIA_PARTS])
        raise refuse(f"content of type {name[:100]!r} is not supported; use one of {names}")
    form, given = MEDIA_PARTS[name], part.get(name)
    given = {key: value for key, value in given.items() if value is not None} if isinstance(given, dict) else {}
    if not all(isinstance(given.get(key), str) for key in form.keys):
        has, rest = " and ".join(f"a {key}" for key in form.keys), ', "format": "wav"' * (len(form.keys) - 1)
        raise refuse(f'{name} is not an object with {has}; send {{"{form.keys[0]}": "{form.example}"{rest}}}')
    for key in given.keys() - {*form.keys}:
        if (name, key, given[key]) != ("image_url", "detail", "auto"):
            raise refuse(f"{name}.{key[:40]}: {repr(given[key])[:40]} is not supported; leave it out")
    where = f"{name}.{form.keys[0]}"
    text = given[form.keys[0]]
    data = decode_url(text, where, form, files) if form.keys[0] == "url" else decode_base64(text, where)
    return RequestMedium(form.kind, data, where, given.get("format"))


def decode_url(url: str, where: str, form: MediaPart, files: Mapping[str, bytes]) -> bytes:
    """The bytes of a data URL, or of one that was fetched."""
    if url in files:
        return files[url]
    if not url.startswith("data:"):
        cure = f"{form.example}, or start the server with fetch_urls: true" if WEB_URL.match(url) else form.example
        raise refuse(f"{where}: {url[:40]!r} is not fetched; send the {form.kind} itself: {cure}")
    head, _, text = url.partition(",")
    if not head.endswith(";base64"):
        raise refuse(f"{where}: is not base64; send {form.example}")
    return decode_base64(text, where)


def decode_base64(text: str, where: str) -> bytes:
    """The bytes that a text is base64 of."""
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise refuse(f"{where}: not base64 ({error}); encode the bytes of the file") from None


def check_surrogates(text: str) -> str:
    """The same text, if UTF-8 can encode it."""
    if (position := find_surrogate(text)) is not None:
        raise refuse(f"a text is not UTF-8 at character {position + 1}; give it in UTF-8")
    return text


def check_request_media(media: Sequence[RequestMedium], limits: MediaLimits) -> None:
    """Check the number and the headers of the media of a request.

    Raises:
        ApiError: if one cannot be read, is too large, or is one too many.
    """
    check_counts([medium.kind for medium in media], limits)
    for medium in media:
        try:
            HEADER_CHECKS[medium.kind](medium, limits)
        except MissingExtraError as error:
            raise ApiError(501, str(error), kind="server_error") from None
        except UserError as error:
            raise refuse(f"{medium.where}: {error}") from None


def check_counts(kinds: Iterable[str], limits: MediaLimits) -> None:
    """Check the number of the media of a request, given their kinds."""
    for kind, count in Counter(kinds).items():
        if count > limits.counts[kind]:
            raise refuse(f"{count} {kind}s are more than max_{kind}s: {limits.counts[kind]}; send fewer")


def check_image(medium: RequestMedium, limits: MediaLimits) -> None:
    """Check the size of an image."""
    height, width = read_picture_size(medium.data)
    if height * width > limits.image_pixels:
        size, limit = f"{width} x {height} pixels", f"max_image_pixels: {limits.image_pixels}"
        raise refuse(f"image of {size}: more than {limit}; send a smaller one")


def check_video(medium: RequestMedium, limits: MediaLimits) -> None:
    """Check the size and number of the frames of a video, which are all decoded if one of the last is read."""
    header = read_video_header(medium.data)
    height, width = header.size
    if header.frames * height * width > limits.video_pixels:
        size, limit = f"{header.frames} frames of {width} x {height} pixels", f"max_video_pixels: {limits.video_pixels}"
        raise refuse(f"video of {size}: more than {limit}; send a shorter or smaller one")


def check_sound(medium: RequestMedium, _limits: MediaLimits) -> None:
    """Check the format of a sound, whose length the processor of the model limits."""
    formats = read_sound_formats(medium.data)
    if medium.format is None:
        return
    if medium.format not in INPUT_FORMATS:
        names = ", ".join(INPUT_FORMATS)
        raise refuse(f"input_audio.format: {medium.format[:40]!r} is not supported; use one of {names}")
    if INPUT_FORMATS[medium.format] not in formats:
        raise refuse(f"input_audio.format: {medium.format!r} is not that of the sound, {formats[0]}; send its own")


HEADER_CHECKS: dict[str, Callable[[RequestMedium, MediaLimits], None]] = {
    "image": check_image,
    "video": check_video,
    "audio": check_sound,
}
"""By the kind of a medium."""
