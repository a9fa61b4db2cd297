"""Small videos, drawn."""

from io import BytesIO
from pathlib import Path

import av
import numpy as np

RATE = 16000  # of sounds
MOVING = 3  # pixels that the square of a video moves by from frame to frame


def draw_frames(frames: int, size: tuple[int, int], seed: int = 0) -> np.ndarray:
    """The frames (F, H, W, 3) of a video, uint8: a square that moves over a slope, brighter from frame to frame."""
    height, width = size
    slope = np.linspace(0, 120, width)[None, :, None] + np.linspace(0, 60, height)[:, None, None]
    colors = np.random.default_rng(seed).integers(0, 60, 3)
    drawn = np.stack([slope + colors + 50 * number / frames for number in range(frames)])
    for number, frame in enumerate(drawn):
        left = number * MOVING % max(width - 8, 1)
        frame[height // 4 : height // 2, left : left + 8] = 250
    return drawn.clip(0, 255).astype(np.uint8)


def draw_tone(seconds: float) -> np.ndarray:
    """The samples of a tone, (N,) at 16 kHz."""
    return 0.4 * np.sin(np.arange(round(RATE * seconds)) * 0.2)


def write_video(
    path: Path | BytesIO,
    frames: int,
    size: tuple[int, int] = (48, 64),
    *,
    rate: int = 8,
    codec: str = "libx264",
    form: str | None = None,
    turn: int = 0,
    keys: int = 12,
    seed: int = 0,
    options: dict[str, str] | None = None,
    sound: np.ndarray | None = None,
    sound_codec: str = "pcm_s16le",
    sound_rate: int = RATE,
) -> np.ndarray:
    """Write a video; returns its frames as they were drawn, (F, H, W, 3).

    Args:
        rate: frames a second.
        form: the format of the file, if its name does not say it.
        turn: degrees by which it is shown turned.
        keys: distance of key frames.
        options: of the format.
        sound: the samples of a sound track, (N,) at 16 kHz; None for none.
        sound_rate: samples a second in the file.
    """
    drawn = draw_frames(frames, size, seed)
    target = str(path) if isinstance(path, Path) else path
    with av.open(target, "w", format=form, options=options or {}) as container:
        stream = container.add_stream(codec, rate=rate, options={"g": str(keys)})
        stream.height, stream.width = size
        stream.pix_fmt, stream.gop_size = "yuv420p", keys
        track = None if sound is None else container.add_stream(sound_codec, rate=sound_rate, layout="mono")
        if turn:
            stream.set_display_rotation(turn)
        for pixels in drawn:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
        if track is not None and sound is not None:
            frame = av.AudioFrame.from_ndarray((sound * 32767).astype(np.int16)[None], format="s16", layout="mono")
            frame.sample_rate = RATE
            resampler = av.AudioResampler(track.format, track.layout, track.rate, track.frame_size or None)
            for part in [*resampler.resample(frame), *resampler.resample(None)]:
                container.mux(track.encode(part))
            container.mux(track.encode())
    return drawn
