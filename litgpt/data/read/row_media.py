"""The images, videos and sounds of a row at their places in its messages."""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Any

from litgpt.data.read.fields import BadRow
from litgpt.data.read.media import KINDS_OF_MARKS, MARKS, MEDIA_KINDS, Medium, parse_medium, refuse_url
from litgpt.data.read.message import Message

MediaSources = Mapping[str, Sequence[Any]]
"""The sources of media beside a text, by kind."""
MediaStep = Callable[[Message], Message]
"""Changes the media of a message when they have files, such as long sounds into pieces; may raise a BadRow."""


def list_media_sources(row: Mapping[str, Any]) -> dict[str, list[Any]]:
    """The media beside the text of a row, such as its column `images` or `image`; without kinds that it has none of."""
    sources = {}
    for kind, form in MEDIA_KINDS.items():
        names = [name for name in form.columns if row.get(name)]
        if len(names) > 1:
            raise BadRow("duplicate column", f"{names[0]} and {names[1]} both hold {kind}s; remove one")
        for name in names:
            value = row[name]
            sources[kind] = list(value) if isinstance(value, list | tuple) else [value]
    return sources


def attach_media(messages: Sequence[Message], sources: MediaSources) -> tuple[Message, ...]:
    """Put the media of a row in the place of the tags in its messages, the k-th of a kind in that of the k-th.

    Those without a tag are before the text of the first message.

    Args:
        sources: as `list_media_sources` returns them; without any of a kind, its tag is text.

    Raises:
        BadRow: if there are more tags of a kind than media.
    """
    for message in messages:
        if len(MARKS.findall(message.content)) != len(message.media):
            raise BadRow("text with a character that stands for an image, video or sound", repr(message.content[:80]))
    beside = {kind: [parse_medium(source, kind) for source in sources.get(kind, ())] for kind in MEDIA_KINDS}
    places = dict(KINDS_OF_MARKS) | {MEDIA_KINDS[kind].tag: kind for kind, media in beside.items() if media}
    pattern = re.compile("|".join(map(re.escape, places)))
    counts = Counter(places[match] for message in messages for match in pattern.findall(message.content))
    counts.subtract(medium.kind for message in messages for medium in message.media if medium.is_known)
    extra = list[Medium]()
    for kind, media in beside.items():
        if counts[kind] > len(media):
            raise BadRow(f"more places for {kind}s than {kind}s", f"{counts[kind]} places, {len(media)} {kind}s")
        extra += media[: len(media) - counts[kind]]
    waiting = {kind: iter(media[len(media) - counts[kind] :]) for kind, media in beside.items()}
    attached = list[Message]()
    for message in messages:
        known = iter(message.media)
        placed = [
            next(known) if match in KINDS_OF_MARKS else Medium(kind=places[match])
            for match in pattern.findall(message.content)
        ]
        placed = [medium if medium.is_known else next(waiting[medium.kind]) for medium in placed]
        content = pattern.sub(lambda match: MEDIA_KINDS[places[match[0]]].mark, message.content)
        attached.append(replace(message, content=content, media=tuple(placed)))
    if extra:
        first, marks = attached[0], "".join(MEDIA_KINDS[medium.kind].mark for medium in extra)
        attached[0] = replace(first, content=marks + first.content, media=(*extra, *first.media))
    return tuple(attached)


def resolve_media(
    messages: Sequence[Message],
    folder: Path | None,
    fetch: Callable[[Medium], Path] = refuse_url,
    steps: Sequence[MediaStep] = (),
) -> tuple[Message, ...]:
    """The messages with a file for each of their media that has a path or a URL.

    Args:
        folder: that paths are relative to and may not leave; None for any paths.
        fetch: finds the file of one at a URL, or raises a BadRow.
        steps: change the messages then, one after the other.

    Raises:
        BadRow: for a path that leaves the folder, and for a URL that is refused or cannot be fetched; and by `steps`.
    """
    root = None if folder is None else folder.resolve()

    def resolve(medium: Medium) -> Medium:
        if medium.url is not None:
            return replace(medium, path=str(fetch(medium)))
        if medium.path is None or root is None:
            return medium
        try:
            path = (root / medium.path).resolve()
        except (OSError, RuntimeError):  # the latter before Python 3.13
            raise BadRow(f"{medium.kind} not found", f"{medium.path}: links that lead to themselves") from None
        if not path.is_relative_to(root):
            cure = f"{medium.path}; set data.media_dir to its folder"
            raise BadRow(f"{medium.kind} outside of the folder of the data", cure)
        return replace(medium, path=str(path))

    resolved = (
        replace(message, media=tuple(map(resolve, message.media))) if message.media else message for message in messages
    )
    return tuple(reduce(lambda changed, step: step(changed), steps, message) for message in resolved)
