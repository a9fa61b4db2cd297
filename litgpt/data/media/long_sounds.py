"""Split sounds that are longer than a model hears into pieces, each a sound of its own."""

from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path

from litgpt.data.media.errors import MediumError
from litgpt.data.media.sounds import SoundSettings, read_sound_samples, read_sound_settings
from litgpt.data.media.sources import find_source
from litgpt.data.read.fields import BadRow
from litgpt.data.read.media import MARKS, Medium
from litgpt.data.read.message import Message
from litgpt.data.read.row_media import MediaStep
from litgpt.errors import UserError
from litgpt.model.config import Config

MOST_PIECES = 120  # an hour, of a model that hears 30 seconds


def open_splitter(folder: Path, config: Config | None, *, key: str = "split_sounds") -> MediaStep:
    """What splits the sounds that are longer than a model hears.

    Args:
        folder: of its processor.
        config: None for a tokenizer alone.
        key: of the setting that asks for it, for errors.

    Raises:
        UserError: if the model has no audio tower, or its processor is missing or not supported.
    """
    if config is None or config.audio is None:
        raise UserError(f"{key}: true has no effect on a model without an audio tower; leave it out")
    return partial(split_message, settings=read_sound_settings(folder))


def split_message(message: Message, settings: SoundSettings) -> Message:
    """A message with the pieces of each long sound in its place.

    Raises:
        BadRow: if a sound cannot be read, or is longer than `MOST_PIECES` pieces.
    """
    if not message.media:
        return message
    try:
        pieces = [split_sound(medium, settings) for medium in message.media]
    except MediumError as error:
        raise BadRow(error.reason, str(error)) from None
    counts = iter(map(len, pieces))
    content = MARKS.sub(lambda match: match[0] * next(counts), message.content)
    return replace(message, content=content, media=tuple(chain.from_iterable(pieces)))


def split_sound(medium: Medium, settings: SoundSettings) -> list[Medium]:
    """The pieces of a sound, as few as possible and of equal length; a sound that the model hears, and others, whole.

    Raises:
        MediumError: if it cannot be read, or is longer than `MOST_PIECES` pieces.
    """
    if medium.kind != "audio":
        return [medium]
    samples = read_sound_samples(find_source(medium), settings, pieces=MOST_PIECES)
    if samples <= settings.most_samples:
        return [medium]
    length = -(-samples // -(-samples // settings.most_samples))
    starts = range(0, samples, length)
    return [replace(medium, start=start, stop=min(start + length, samples)) for start in starts]
