"""What changes the media of messages that have files: long sounds into pieces, videos to those with their sound."""

from pathlib import Path

from litgpt.data.media.long_sounds import open_splitter
from litgpt.data.media.sound_tracks import open_track_finder
from litgpt.data.read.row_media import MediaStep
from litgpt.model.config import Config
from litgpt.model.registry import has_config


def find_media_steps(folder: Path, *, split_sounds: bool, video_sounds: bool) -> list[MediaStep]:
    """The steps of rows for the model in a folder; errors as `open_media_steps`."""
    if not (split_sounds or video_sounds):
        return []
    config = Config.from_checkpoint(folder) if has_config(folder) else None
    return open_media_steps(folder, config, split_sounds=split_sounds, video_sounds=video_sounds, prefix="data.")


def open_media_steps(
    folder: Path, config: Config | None, *, split_sounds: bool, video_sounds: bool, prefix: str = ""
) -> list[MediaStep]:
    """The steps that settings ask for.

    Args:
        folder: of the model's processor.
        config: None for a tokenizer alone.
        prefix: of the keys of the settings, for errors.

    Raises:
        UserError: naming a setting that has no effect on the model.
    """
    steps = [open_splitter(folder, config, key=f"{prefix}split_sounds")] if split_sounds else []
    return [*steps, *([open_track_finder(config, key=f"{prefix}video_sounds")] if video_sounds else [])]
