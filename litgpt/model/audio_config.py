"""The shape of an audio tower and of its projector: `Config.audio`, checked."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, get_type_hints

from litgpt.model.field_checks import check_type, field_error
from litgpt.model.tower_config import BlockShape

AUDIO_SIZES = ("width", "layers", "heads", "mlp_size", "mels", "places")
STRIDE = 2  # frames of the second convolution, and what it returns per feature
REACH = 2  # frames after a sound that the convolutions of its last place reach


@dataclass(frozen=True, kw_only=True)
class AudioShape(BlockShape):
    """An audio tower, which encodes log-mel frames of sounds, and the projector of its features to the decoder's width.

    Two convolutions make one place of two frames (Radford et al. 2022, Whisper, section 2.2); a feature is the mean of
    two places.

    Attributes:
        mels: number of mel bands.
        places: number of positions, so the longest sound has twice as many frames.
        audio_token: id of the token at whose places the decoder reads features.
        text: what stands for a sound in a text that no chat template has written, with `{audio}` for this token.
    """

    mels: int
    places: int
    audio_token: int
    text: str = "{audio}"

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> "AudioShape":
        """The shape with these fields.

        Raises:
            UserError: naming a field of `model_config.audio` that is missing, unknown or has an invalid value.
        """
        types = get_type_hints(cls)
        for key in sorted({*AUDIO_SIZES, "audio_token"} - values.keys()):
            raise field_error(f"audio.{key}", "missing", "set it")
        for key in sorted(values.keys() - types.keys()):
            raise field_error(f"audio.{key}", "unknown field", "remove it")
        shape = cls(**{key: check_type(f"audio.{key}", value, types[key]) for key, value in values.items()})
        for key in AUDIO_SIZES:
            if not 1 <= getattr(shape, key) <= 2**20:
                raise field_error(f"audio.{key}", f"{getattr(shape, key)} is out of range", f"use 1 to {2**20}")
        if shape.width % shape.heads:
            problem = f"{shape.width} does not fit {shape.heads} heads"
            raise field_error("audio.width", problem, f"use e.g. {shape.heads * 64}")
        return shape

    def to_dict(self) -> dict[str, Any]:
        """All fields, as for `from_values`."""
        return asdict(self)

    @property
    def blocks_run(self) -> int:
        """The number of blocks that run: all."""
        return self.layers

    @property
    def media_tokens(self) -> list[int]:
        """The ids of the tokens at whose places the decoder reads features."""
        return [self.audio_token]

    @property
    def most_frames(self) -> int:
        """The number of frames of the longest sound."""
        return STRIDE * self.places

    def count_places(self, frames: int) -> int:
        """The number of places of a sound, of which the blocks read as many."""
        return (frames - 1) // STRIDE + 1

    def count_features(self, frames: int) -> int:
        """The number of features of a sound with this number of frames, so of its tokens."""
        return self.count_places(frames) // STRIDE

    def count_read_frames(self, frames: int) -> int:
        """The number of frames that the convolutions read of a sound: its own, and of the silence after it."""
        return min(frames + REACH, self.most_frames)
