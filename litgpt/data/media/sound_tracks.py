"""The sound tracks of videos: which videos have one, and are read with it."""

from dataclasses import replace

from litgpt.data.media.containers import VIDEO_FORMATS, open_container
from litgpt.data.media.errors import MediumError
from litgpt.data.media.sources import find_source
from litgpt.data.read.fields import BadRow
from litgpt.data.read.media import Medium
from litgpt.data.read.message import Message
from litgpt.data.read.row_media import MediaStep
from litgpt.errors import UserError
from litgpt.model.config import Config


def open_track_finder(config: Config | None, *, key: str = "video_sounds") -> MediaStep:
    """What marks the videos that are read with their sound tracks.

    Args:
        config: of the model; None for a tokenizer alone.
        key: of the setting that asks for it, for errors.

    Raises:
        UserError: if the model does not read sounds among the frames of a video.
    """
    if config is None or config.vision is None or config.audio is None or config.vision.get("chunk_seconds") is None:
        raise UserError(f"{key}: true has no effect on a model that does not hear videos; leave it out")
    return mark_tracks


def mark_tracks(message: Message) -> Message:
    """A message whose videos with a sound track say so; those without one stay as they are.

    Raises:
        BadRow: if a video cannot be read.
    """
    try:
        return replace(message, media=tuple(map(mark_track, message.media))) if message.media else message
    except MediumError as error:
        raise BadRow(error.reason, str(error)) from None


def mark_track(medium: Medium) -> Medium:
    """A medium that says so if it is a video with a sound track; errors as `open_container`."""
    if medium.kind != "video":
        return medium
    with open_container(find_source(medium), "video", VIDEO_FORMATS) as container:
        return replace(medium, has_track=bool(container.streams.audio))


def get_track(video: Medium) -> Medium:
    """The sound track of a video, as a sound."""
    return replace(video, kind="audio")
