"""Rows with sounds that are bad in many ways, among good ones, with the reason that each is counted by."""

import io
import random
import struct
from functools import cache

import av
import numpy as np

from tests.faults.bad_media import (
    DURING_TRAINING,
    BadMedia,
    BadRows,
    Cases,
    Draw,
    build_row,
    draw_noise,
    encode,
    run_command,
    store,
    write_uri,
)
from tests.video_files import write_video

UNREADABLE, LONG = "not a sound that can be read", "sound that is too long"
SHORT = "audio of a size that the model does not read"
RATE = 16000
RIFF_SIZE, CODEC, CHANNELS, SAMPLE_RATE, DATA_SIZE = (4, 8), (20, 22), (22, 24), (24, 28), (40, 44)
"""The bytes of fields in the header of a WAV file, from the first to that after the last."""


@cache
def record(form: str, codec: str, samples: int = 6000, rate: int = RATE, layout: str = "mono") -> bytes:
    """The bytes of a tone with noise."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=form) as container:
        stream = container.add_stream(codec, rate=rate, layout=layout)
        noise = np.random.default_rng(0).normal(size=samples)
        values = ((np.sin(np.arange(samples) / 9) + 0.05 * noise) * 12000).astype(np.int16)
        channels = len(av.AudioLayout(layout).channels)
        frame = av.AudioFrame.from_ndarray(values.repeat(channels)[None], format="s16", layout=layout)
        frame.sample_rate = rate
        resampler = av.AudioResampler(
            format=stream.format.name, layout=layout, rate=stream.rate, frame_size=stream.frame_size
        )
        for each in [*resampler.resample(frame), *resampler.resample(None)]:
            container.mux(stream.encode(each))
        container.mux(stream.encode(None))
    return buffer.getvalue()


def build_wav(samples: int, changes: dict[tuple[int, int], int] | None = None) -> bytes:
    """A WAV file with other values in fields of its header."""
    data = bytes(2 * samples)
    fields = (b"RIFF", 36 + len(data), b"WAVE", b"fmt ", 16, 1, 1, RATE, 2 * RATE, 2, 16, b"data", len(data))
    header = bytearray(struct.pack("<4sI4s4sIHHIIHH4sI", *fields))
    for (start, stop), value in (changes or {}).items():
        header[start:stop] = value.to_bytes(stop - start, "little")
    return bytes(header) + data


def cut_sound(form: str, codec: str, low: float, high: float) -> Draw:
    """A sound cut at a random place between two fractions of it."""

    def build(draw: random.Random) -> bytes:
        data = record(form, codec)
        return data[: max(1, int(len(data) * draw.uniform(low, high)))]

    return store(build)


def claim_more(draw: random.Random) -> bytes:
    """A WAV file that says that it is larger than it is."""
    size = draw.randint(10**6, 2**31 - 10**6)
    return build_wav(6000, {RIFF_SIZE: size, DATA_SIZE: size - 36})


@cache
def film_silently() -> bytes:
    """A video without a sound."""
    buffer = io.BytesIO()
    write_video(buffer, 2, (16, 24), form="mp4")
    return buffer.getvalue()


HEADERS: list[dict[tuple[int, int], int]] = [{SAMPLE_RATE: 0}, {CHANNELS: 0}, {CODEC: 0x7777}]
"""Of WAV files that nothing can read."""
LISTS = [
    b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n",
    b"#EXTM3U\nhttp://169.254.169.254/latest\n",
    b"ffconcat version 1.0\nfile '/etc/passwd'\n",
    b"[playlist]\nFile1=/etc/passwd\nNumberOfEntries=1\n",
]
BAD: Cases = [
    (10, UNREADABLE, store(lambda _: b"")),
    (21, UNREADABLE, store(lambda draw: b"the sound of a cat " * draw.randint(1, 50))),
    (30, UNREADABLE, store(lambda draw: draw.randbytes(draw.randint(1, 3000)))),
    (20, UNREADABLE, store(lambda draw: b"RIFF\xf0\x0f\0\0WAVEfmt " + draw.randbytes(draw.randint(0, 300)))),
    (10, UNREADABLE, store(lambda draw: b"fLaC" + draw.randbytes(draw.randint(0, 300)))),
    (10, UNREADABLE, store(lambda draw: b"OggS" + draw.randbytes(draw.randint(0, 300)))),
    (10, UNREADABLE, store(lambda draw: b"ID3\x04\0\0\0\0\0\0" + draw.randbytes(draw.randint(0, 60)))),
    (20, UNREADABLE, store(lambda draw: draw.choice(LISTS))),
    (20, UNREADABLE, run_command),
    (30, UNREADABLE, cut_sound("wav", "pcm_s16le", 0.0, 0.98)),
    (10, UNREADABLE, store(claim_more)),
    (10, UNREADABLE, store(lambda draw: build_wav(6000, draw.choice(HEADERS)))),
    (5, UNREADABLE, store(lambda _: build_wav(0))),
    (10, UNREADABLE, cut_sound("flac", "flac", 0.0, 0.005)),
    (10, UNREADABLE, store(lambda draw: encode(draw_noise(draw), draw.choice(["PNG", "JPEG", "GIF"])))),
    (5, UNREADABLE, store(lambda _: film_silently())),
    (10, UNREADABLE, write_uri(lambda draw: draw.randbytes(100))),
    (15, LONG, store(lambda draw: build_wav(draw.randint(RATE + 1, 3 * RATE)))),
    (5, LONG, store(lambda draw: build_wav(5000, {SAMPLE_RATE: draw.randint(1, 999)}))),
    (5, LONG, store(lambda _: record("mp3", "libmp3lame", 60 * RATE))),
    (5, LONG, store(lambda _: record("ogg", "libopus", 60 * RATE))),
    (10, SHORT, store(lambda draw: build_wav(draw.randint(1, 320)))),
    (30, DURING_TRAINING, cut_sound("flac", "flac", 0.55, 0.95)),
]
GOOD: list[Draw] = [
    store(lambda _: record("wav", "pcm_s16le")),
    store(lambda _: record("wav", "pcm_u8")),
    store(lambda _: record("wav", "pcm_s24le", layout="stereo")),
    store(lambda _: record("wav", "pcm_f32le", rate=48000, samples=20_000)),
    store(lambda _: record("aiff", "pcm_s16be")),
    store(lambda _: record("flac", "flac", layout="stereo")),
    store(lambda _: record("mp3", "libmp3lame")),
    store(lambda _: record("ogg", "libopus")),
    store(lambda _: record("adts", "aac")),
    store(lambda _: record("mp4", "aac")),
    store(lambda _: record("matroska", "libopus")),
    store(lambda _: build_wav(6000, {RIFF_SIZE: 2**32 - 1, DATA_SIZE: 2**32 - 1})),  # of a program that writes a pipe
    write_uri(lambda _: record("wav", "pcm_s16le")),
]
ROWS: BadRows = [
    (20, "not one place for each audio", build_row("<|AUDIO|>?")),
    (10, "image data is not supported", {**build_row("?"), "images": ["a.png"]}),
    (10, "video data is not supported", {**build_row("?"), "videos": ["a.mp4"]}),
]
SOUNDS = BadMedia("audio", "sound", UNREADABLE, ".wav", BAD, GOOD, ROWS)
