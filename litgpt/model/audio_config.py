"""The shape of an audio tower and of its projector: `Config.audio`, checked."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_type_hints

from litgpt.model.field_checks import check_type, field_error
from litgpt.model.tower_config import BlockShape

AUDIO_SIZES = ("width", "layers", "heads", "mlp_size", "mels", "places")
STRIDE = 2  # frames of the second convolution, and what it returns per feature
REACH = 2  # frames after a sound that the convolutions of its last place reach
LEAST_SINUSOIDS = 4  # numbers of a position: a sine and a cosine of the first and of the last frequency


@dataclass(frozen=True, kw_only=True)
class AudioShape(BlockShape):
    """An audio tower, which encodes log-mel frames of sounds, and the projector of its features to the decoder's width.

    Two convolutions make one place of two frames (Radford et al. 2022, Whisper, section 2.2); a feature is the mean of
    two places.

    Attributes:
        mels: number of mel bands.
        places: number of positions; the longest sound has twice as many frames, unless it is cut into chunks.
        chunk_places: places of the chunks of a sound, each of which is encoded by itself, with positions from 0; None
            for one of all.
        positions: a published table, or sinusoids that are in no file.
        edge_tokens: whether embeddings of the tokens around a sound are published with the tower; they are not used.
        audio_token: id of the token at whose places the decoder reads features.
        start_token, end_token: ids of the tokens around them, as published.
        text: what stands for a sound in a text that no chat template has written, with `{audio}` for this token.
    """

    mels: int
    places: int
    chunk_places: int | None = None
    positions: Literal["table", "sinusoids"] = "table"
    edge_tokens: bool = False
    audio_token: int
    start_token: int | None = None
    end_token: int | None = None
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
        if shape.positions == "sinusoids" and (shape.width % 2 or shape.width < LEAST_SINUSOIDS):
            problem = f"{shape.width} does not fit sinusoids, which are two pairs or more"
            raise field_error("audio.width", problem, f"use e.g. {shape.heads * 64}")
        if shape.chunk_places is not None and not 1 <= shape.chunk_places <= shape.places:
            problem = f"{shape.chunk_places} with places: {shape.places}"
            raise field_error("audio.chunk_places", problem, f"use 1 to {shape.places}")
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
    def most_frames(self) -> int | None:
        """The number of frames of the longest sound; None for sounds of any length."""
        return STRIDE * self.places if self.chunk_places is None else None

    def list_chunks(self, frames: int) -> list[int]:
        """The frames of each chunk of a sound; the last may have fewer than the others."""
        if self.chunk_places is None:
            return [frames]
        chunk = STRIDE * self.chunk_places
        return [min(chunk, frames - start) for start in range(0, frames, chunk)]

    def count_places(self, frames: int) -> int:
        """The number of places of a sound, or a chunk, of which the blocks read as many."""
        return (frames - 1) // STRIDE + 1

    def count_features(self, frames: int) -> int:
        """The number of features of a sound with this number of frames, so of its tokens."""
        return self.count_places(frames) // STRIDE

    def count_read_frames(self, frames: int) -> int:
        """The number of frames that the convolutions read: those of the sound, and of the silence after it.

        They read nothing after a chunk, also where the sound goes on.
        """
        return frames if self.most_frames is None else min(frames + REACH, self.most_frames)
