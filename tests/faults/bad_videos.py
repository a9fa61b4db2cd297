"""Rows with videos that are bad in many ways, among good ones, with the reason that each is counted by."""

import io
import random
import re
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

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
from tests.faults.bad_sounds import record
from tests.video_files import write_video

UNREADABLE, HUGE = "not a video that can be read", "video with too many pixels"
NARROW = "video of a size that the model does not read"
SIZE = (16, 24)  # height and width
PNG_START = b"\x89PNG\r\n\x1a\n"


@cache
def film(form: str, codec: str, faststart: bool = False, seed: int = 0, size: tuple[int, int] = SIZE) -> bytes:
    """The bytes of a video of 8 frames, 4 a second."""
    options = {"movflags": "faststart"} if faststart else {}
    with TemporaryDirectory() as folder:
        path = Path(folder) / "film"
        write_video(path, 8, size, rate=4, form=form, codec=codec, seed=seed, options=options)
        return path.read_bytes()


@cache
def film_losslessly() -> bytes:
    """The bytes of a video each frame of which is a PNG file."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mov") as container:
        stream = container.add_stream("png", rate=4)
        stream.height, stream.width = SIZE
        stream.pix_fmt = "rgb24"
        for number in range(8):
            pixels = np.full((*SIZE, 3), 20 * number, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()


def cut_film(form: str, codec: str, low: float, high: float, *, faststart: bool = False) -> Draw:
    """A video cut at a random place between two fractions of what follows its index, or of all."""

    def build(draw: random.Random) -> bytes:
        data = film(form, codec, faststart)
        start = data.index(b"mdat") if faststart else 0
        return data[: start + max(1, int((len(data) - start) * draw.uniform(low, high)))]

    return store(build)


def claim_size(draw: random.Random) -> bytes:
    """An AVI file whose header has another size than its frames."""
    data = bytearray(film("avi", "rawvideo"))
    start = data.index(b"strf") + 12
    for place in (start, start + 4):
        data[place : place + 4] = draw.randint(10_000, 15_000).to_bytes(4, "little")
    return bytes(data)


def use_unknown_codec(draw: random.Random) -> bytes:
    """An AVI file in a code that nothing decodes."""
    name = bytes(draw.choices(b"ZXQJK", k=4))
    return film("avi", "mpeg4").replace(b"FMP4", name)


def break_frame(draw: random.Random) -> bytes:
    """A video one of whose last frames is damaged."""
    data = bytearray(film_losslessly())
    starts = [match.start() for match in re.finditer(re.escape(PNG_START), data)]
    start = draw.choice((starts[4], starts[6]))  # frames that are read
    data[start : start + len(PNG_START)] = bytes(len(PNG_START))
    return bytes(data)


def list_playlists() -> list[bytes]:
    """Files that name others."""
    return [
        b"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\n/etc/passwd\n#EXT-X-ENDLIST\n",
        b"#EXTM3U\n#EXTINF:10,\nhttp://169.254.169.254/latest\n",
        b"ffconcat version 1.0\nfile '/etc/passwd'\n",
        b"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n",
        b"<?xml version='1.0'?><MPD xmlns='urn:mpeg:dash:schema:mpd:2011'><BaseURL>file:///etc/</BaseURL></MPD>",
        b"[playlist]\nFile1=/etc/passwd\nNumberOfEntries=1\n",
    ]


BAD: Cases = [
    (10, UNREADABLE, store(lambda _: b"")),
    (20, UNREADABLE, store(lambda draw: b"a video of a cat " * draw.randint(1, 50))),
    (30, UNREADABLE, store(lambda draw: draw.randbytes(draw.randint(1, 3000)))),
    (30, UNREADABLE, store(lambda draw: b"\0\0\0\x18ftypmp42" + draw.randbytes(draw.randint(0, 300)))),
    (20, UNREADABLE, store(lambda draw: b"\x1a\x45\xdf\xa3" + draw.randbytes(draw.randint(0, 300)))),
    (20, UNREADABLE, store(lambda draw: draw.choice(list_playlists()))),
    (20, UNREADABLE, run_command),
    (25, UNREADABLE, cut_film("mp4", "libx264", 0.0, 0.9)),
    (26, UNREADABLE, cut_film("mp4", "libx264", 0.05, 0.5, faststart=True)),
    (20, UNREADABLE, cut_film("avi", "mpeg4", 0.0, 0.6)),
    (10, UNREADABLE, cut_film("matroska", "libx264", 0.0, 0.05)),
    (10, UNREADABLE, store(lambda draw: encode(draw_noise(draw), draw.choice(["PNG", "JPEG", "BMP"])))),
    (10, UNREADABLE, store(lambda draw: record(*draw.choice([("wav", "pcm_s16le"), ("mp4", "aac")])))),
    (10, UNREADABLE, store(use_unknown_codec)),
    (10, UNREADABLE, write_uri(lambda draw: draw.randbytes(100))),
    (10, HUGE, store(claim_size)),
    (10, NARROW, store(lambda _: film("matroska", "ffv1", size=(2, 500)))),
    (20, DURING_TRAINING, store(break_frame)),
]
GOOD: list[Draw] = [
    store(lambda draw: film("mp4", "libx264", seed=draw.randint(0, 3))),
    store(lambda _: film("mp4", "libx264", faststart=True)),
    store(lambda _: film("mov", "mpeg4")),
    store(lambda _: film("avi", "mpeg4")),
    store(lambda _: film("avi", "rawvideo")),
    store(lambda _: film("matroska", "ffv1")),
    store(lambda _: film("webm", "libvpx-vp9")),
    store(lambda _: film("mpegts", "libx264")),
    store(lambda _: film_losslessly()),
    write_uri(lambda _: film("mp4", "libx264")),
]
ROWS: BadRows = [
    (20, "not one place for each image", build_row("<video>?")),
    (20, "audio data is not supported", {**build_row("?"), "audios": ["a.wav"]}),
]
VIDEOS = BadMedia("video", "video", UNREADABLE, ".mp4", BAD, GOOD, ROWS)
