"""Open sounds, and compute their log-mel frames as the published processor of a model folder does, to the bit."""

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from litgpt.data.media.containers import VIDEO_FORMATS, import_av, open_container
from litgpt.data.media.errors import MediumError
from litgpt.data.media.picture_settings import read_processor
from litgpt.errors import UserError

if TYPE_CHECKING:
    from av.audio.stream import AudioStream
    from av.container import InputContainer

EXTRACTOR = "WhisperFeatureExtractor"
EXTRACTOR_DEFAULTS: dict[str, Any] = {"feature_size": 80, "sampling_rate": 16000, "hop_length": 160, "chunk_length": 30}
EXTRACTOR_DEFAULTS |= {"n_fft": 400, "padding_value": 0.0, "dither": 0.0}
KIND = "sound"
SOUND_FORMATS = ("wav", "w64", "aiff", "mp3", "flac", "aac", *VIDEO_FORMATS)
"""FFmpeg's names of the formats that are read; others, such as playlists, open files that they name."""
EXACT_CODECS = ("pcm_", "flac")
"""Starts of the names of codecs for which the header says how many samples there are."""
RIFF_HEADER = 8  # bytes before those that a RIFF header counts
UNKNOWN_SIZE = 0x7FFFF000  # what programs write that do not know the size, or more
MEL_BREAK, MEL_STEP, MEL_LOG_STEP = 1000.0, 200 / 3, 27 / np.log(6.4)  # Slaney's scale: linear below, logarithmic above
HIGHEST = 8000.0  # Hz
PADDED_SECONDS = 30  # of which sounds are computed as multiples
DYNAMIC_RANGE = 8.0  # of the logarithm to base 10, below the largest value


@dataclass(frozen=True)
class SoundSettings:
    """How the sounds of a model become frames.

    Attributes:
        rate: samples per second.
        window, hop: samples that a frame is computed from, and those from one frame to the next.
        mels: number of mel bands.
        seconds: the longest sound; shorter ones are computed with silence after them.
    """

    rate: int
    window: int
    hop: int
    mels: int
    seconds: int

    @property
    def most_samples(self) -> int:
        """The number of samples of the longest sound."""
        return self.rate * self.seconds

    def count_frames(self, samples: int) -> int:
        """The number of frames of a sound."""
        return min(-(-samples // self.hop), self.most_samples // self.hop)


def read_sound_settings(folder: Path) -> SoundSettings:
    """The settings of the processor in a model folder.

    Raises:
        UserError: if the folder has none, or one that is not supported.
    """
    path, values = read_processor(folder, "feature_extractor", "sounds")
    if (kind := values.get("feature_extractor_type")) != EXTRACTOR:
        raise UserError(f"{path}: feature_extractor_type: {kind} is not supported; use {EXTRACTOR}")
    settings = {**EXTRACTOR_DEFAULTS, **{key: values[key] for key in EXTRACTOR_DEFAULTS if values.get(key) is not None}}
    for key in ("padding_value", "dither"):
        if settings.pop(key):
            raise UserError(f"{path}: {key}: {values[key]} is not supported; use 0")
    for key, value in settings.items():
        if not isinstance(value, int) or not 1 <= value <= 2**20:
            raise UserError(f"{path}: {key}: {value!r} is not supported; use e.g. {EXTRACTOR_DEFAULTS[key]}")
    return SoundSettings(
        rate=settings["sampling_rate"],
        window=settings["n_fft"],
        hop=settings["hop_length"],
        mels=settings["feature_size"],
        seconds=settings["chunk_length"],
    )


@contextmanager
def open_sound(source: Path | bytes) -> "Iterator[tuple[InputContainer, AudioStream]]":
    """Open the first sound of a file, of which the header is read at once and the samples when they are needed.

    Raises:
        MissingExtraError: if PyAV is not installed.
        MediumError: here and in the block, if it is not a sound of these formats, or cannot be decoded.
    """
    with open_container(source, KIND, SOUND_FORMATS) as container:
        if not container.streams.audio:
            raise ValueError("no sound in it")
        stream = container.streams.audio[0]
        if stream.codec_context is None:
            raise ValueError("no decoder for it")
        if not stream.codec_context.sample_rate or not stream.codec_context.channels:
            raise ValueError("no sampling rate or no channel")
        if container.format.name == "wav" and (missing := count_missing_bytes(source)) > 0:
            raise ValueError(f"it is cut off, {missing:,} bytes are missing")
        yield container, stream


def count_missing_bytes(source: Path | bytes) -> int:
    """The bytes that a WAV file lacks of those that its header says, of which FFmpeg reads what is there."""
    if isinstance(source, bytes):
        header, size = source[:RIFF_HEADER], len(source)
    else:
        size = source.stat().st_size
        with source.open("rb") as file:
            header = file.read(RIFF_HEADER)
    said = int.from_bytes(header[4:], "little")
    is_known = header[:4] == b"RIFF" and said < UNKNOWN_SIZE
    return said + RIFF_HEADER - size if is_known else 0


def read_sound_samples(
    source: Path | bytes, settings: SoundSettings, *, pieces: int = 1, is_track: bool = False
) -> int:
    """The number of samples of a sound at the rate of the settings: from its header, or if that does not say, decoded.

    Args:
        pieces: the most sounds of the length that the model reads that it may be as long as.
        is_track: whether it is that of a video, which is not split.

    Raises:
        MediumError: as `open_sound`, or if it is longer, or has no samples.
    """
    with open_sound(source) as (container, stream):
        samples, rate = find_samples(stream), stream.codec_context.sample_rate
        if samples is None:
            samples = 0
            for frame in container.decode(stream):
                samples, rate = samples + frame.samples, frame.sample_rate  # which may be twice that of the header
                check_samples(source, -(-samples * settings.rate // rate), settings, pieces, is_track=is_track)
    resampled = -(-samples * settings.rate // rate)
    check_samples(source, resampled, settings, pieces, is_track=is_track)
    return resampled


def read_sound_formats(source: Path | bytes) -> list[str]:
    """FFmpeg's names of the format of a sound's file, of which it has several for some.

    Raises:
        MediumError: as `open_sound`.
    """
    with open_sound(source) as (container, _):
        return container.format.name.split(",")


def find_samples(stream: "AudioStream") -> int | None:
    """The number of samples of a sound by its header; None if that does not say exactly."""
    if not stream.codec_context.name.startswith(EXACT_CODECS) or stream.duration is None or stream.time_base is None:
        return None
    return round(stream.duration * stream.time_base * stream.codec_context.sample_rate)


def check_samples(
    source: Path | bytes, samples: int, settings: SoundSettings, pieces: int = 1, *, is_track: bool = False
) -> None:
    """Check the length of a sound.

    Raises:
        MediumError: if it is longer than the model reads, in this number of pieces, or empty.
    """
    name = str(source) if isinstance(source, Path) else KIND
    if samples > settings.most_samples * pieces:
        seconds = f"{samples / settings.rate:.1f} s"
        cure = f"cut it into pieces of at most {settings.seconds * pieces} s"
        cure = f"{cure}, or set split_sounds: true" if pieces == 1 and not is_track else cure
        raise MediumError(name, "sound that is too long", seconds, cure)
    if samples <= 0:
        raise MediumError(name, "not a sound that can be read", "no samples", "use one with samples")


def decode_sound(source: Path | bytes, settings: SoundSettings) -> Tensor:
    """The samples (N,) of a sound, float32, the mean of its channels at the rate of the settings.

    Raises:
        MediumError: as `read_sound_samples`, or if the file is cut off.
    """
    (samples,) = decode_pieces(source, settings, [None])
    return samples


def decode_pieces(source: Path | bytes, settings: SoundSettings, pieces: Sequence[range | None]) -> Iterator[Tensor]:
    """The samples (N,) of pieces of a sound, as of `decode_sound`, in one pass that ends with the last of them.

    Args:
        pieces: the samples of each, at the rate of the settings, ascending; None for all of a sound that the model
            reads, alone.

    Raises:
        MediumError: as `decode_sound`, or if a piece is not all there.
    """
    av, waiting, decoded, rate = import_av(KIND), deque(pieces), 0, 1
    with open_sound(source) as (container, stream):
        expected = find_samples(stream)
        resampler, buffer = av.AudioResampler(format="fltp", rate=settings.rate), SampleBuffer()
        for frame in container.decode(stream):
            decoded, rate = decoded + frame.samples, frame.sample_rate
            buffer.add(resampler.resample(frame))
            if waiting[0] is None:
                check_samples(source, -(-decoded * settings.rate // rate), settings)
                continue
            buffer.drop(waiting[0].start)
            while waiting and (piece := waiting[0]) is not None and buffer.stop >= piece.stop:
                waiting.popleft()
                yield buffer.take(piece)
            if not waiting:
                return
        samples = -(-decoded * settings.rate // rate)
        check_samples(source, min(samples, settings.most_samples), settings)  # whether there are any
        buffer.add(resampler.resample(None))
        if expected not in (None, decoded):
            raise ValueError(f"the header says {expected} samples, but {decoded} are there")
        for each in waiting:
            if each is not None and samples < each.stop:
                raise ValueError(f"it ends at sample {samples}, before {each.stop}")
            yield buffer.take(range(samples) if each is None else each)


class SampleBuffer:
    """The samples of a sound that are decoded and still needed.

    Attributes:
        stop: the number of all samples so far.
    """

    def __init__(self) -> None:
        self.stop, self._start = 0, 0
        self._parts: deque[np.ndarray] = deque()

    def add(self, frames: Sequence[Any]) -> None:
        """Add the samples of decoded frames."""
        for frame in frames:
            self._parts.append(frame.to_ndarray().mean(0))
            self.stop += len(self._parts[-1])

    def drop(self, start: int) -> None:
        """Forget samples before one, as far as whole parts."""
        while self._parts and self._start + len(self._parts[0]) <= start:
            self._start += len(self._parts.popleft())

    def take(self, piece: range) -> Tensor:
        """The samples (N,) of a piece, and silence for those that the resampler has kept.

        It keeps the last ones of a sound, by its filter, which may be all of a sound of a few.
        """
        self.drop(piece.start)
        first, joined = piece.start - self._start, np.concatenate([*self._parts, np.zeros(0, np.float32)])
        decoded = torch.from_numpy(joined[first : first + len(piece)].copy())
        return torch.nn.functional.pad(decoded, (0, len(piece) - len(decoded)))


def compute_log_mel(samples_N: Tensor, settings: SoundSettings) -> Tensor:
    """The log-mel frames (F, mels) of a sound and some silence after it (Radford et al. 2022, Whisper, section 2.2).

    The logarithm of the power is limited to a range below the largest value, and shifted and scaled to about -1 to 1.
    The frames are those of a sound with silence up to `most_samples`, of which no more are computed than fill
    `PADDED_SECONDS` or a multiple: the others are silence too.
    """
    piece = PADDED_SECONDS * settings.rate
    total = min(-(-(len(samples_N) + settings.window) // piece) * piece, settings.most_samples)
    padded = torch.nn.functional.pad(samples_N, (0, total - len(samples_N)))
    window = torch.hann_window(settings.window)
    spectrum = torch.stft(padded[None], settings.window, settings.hop, window=window, return_complex=True)
    power = (spectrum[..., :-1].abs() ** 2).contiguous()
    log_mel = (build_mel_filters(settings).T @ power).clamp(min=1e-10).log10()
    log_mel = torch.maximum(log_mel, log_mel.max() - DYNAMIC_RANGE)
    return ((log_mel + 4.0) / 4.0)[0].T


@cache
def build_mel_filters(settings: SoundSettings) -> Tensor:
    """The weights (bins, mels) of frequency bins in triangular bands of equal area, whose corners are equally spaced on
    Slaney's mel scale from 0 to 8000 Hz (Slaney 1998, Auditory Toolbox)."""
    bins = np.linspace(0, settings.rate // 2, 1 + settings.window // 2)
    linear = MEL_BREAK / MEL_STEP
    mels = np.linspace(0.0, linear + np.log(HIGHEST / MEL_BREAK) * MEL_LOG_STEP, settings.mels + 2)
    corners = np.where(mels < linear, MEL_STEP * mels, MEL_BREAK * np.exp((mels - linear) / MEL_LOG_STEP))
    distances, widths = corners - bins[:, None], np.diff(corners)
    triangles = np.maximum(0.0, np.minimum(-distances[:, :-2] / widths[:-1], distances[:, 2:] / widths[1:]))
    return torch.from_numpy(triangles * (2.0 / (corners[2:] - corners[:-2]))).float()
