"""A thousand rows with images that are bad in many ways, among good ones, with the reason that each is counted by.

Also what is bad in the sources of all media: paths, links, addresses and base64.
"""

import base64
import io
import json
import os
import pickle
import random
import struct
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from tests.vision_model import write_rows

MARKER = "was_run"
"""The file that hostile images would write, if anything ran them."""
UNREADABLE, HUGE = "not an image that can be read", "image with too many pixels"
NARROW = "image of a size that the model does not read"
DURING_TRAINING = "not decoded"
"""The reason of images whose header is right, which are noticed when they are decoded."""
Draw = Callable[[random.Random, Path], Any]
"""Draws the source of a medium; a file goes to the path."""
Cases = list[tuple[int, str, Draw]]
"""The number of rows, the reason that they are counted by, and what draws the source of each."""
BadRows = list[tuple[int, str, dict[str, Any]]]
"""The number of copies, the reason that they are counted by, and the row."""
ANSWER = {"role": "assistant", "content": "red"}


@dataclass(frozen=True)
class BadMedia:
    """Media of one kind, bad and good ones.

    Attributes:
        kind: in rows.
        name: in the reasons of files.
        unreadable: the reason of a file that is none.
        suffix: of the names of files.
    """

    kind: str
    name: str
    unreadable: str
    suffix: str
    bad: Cases
    good: Sequence[Draw]
    rows: BadRows = field(default_factory=list)

    def list_bad_sources(self, share: int) -> Cases:
        """Sources that are bad whatever is in their file; one of `share` of the usual number of each."""
        kind, suffix = self.kind, self.suffix
        missing, outside = f"{self.name} not found", f"{kind} outside of the folder of the data"
        names = [f"../a{suffix}", "/etc/passwd", f"a/../../b{suffix}", "/dev/random", "/proc/self/environ"]
        urls = [f"https://x.org/a{suffix}", "http://169.254.169.254/a", "file:///etc/passwd", f"FTP://x/a{suffix}"]
        uri = f"data:{kind}/x;base64,"
        no_text: list[Any] = [7, True, None, [], [["a"]], {"bytes": [137, 80]}, {"type": "base64", "data": 7}]
        cases: Cases = [
            (60, missing, lambda draw, path: f"{draw.choice(['none', 'a/b/c', 'x.y/..'])}/{path.name}"),
            (10, missing, make_folder),
            (5, missing, make_pipe),
            (10, missing, link(f"nowhere{suffix}")),
            (5, self.unreadable, lambda draw, path: path.name * draw.randint(100, 900)),
            (5, f"{kind} not found", lambda draw, path: link(path.name)(draw, path)),
            (20, outside, link("/etc/passwd")),
            (10, outside, link("/dev/zero")),
            (40, outside, choose(*names)),
            (30, f"{kind} at a URL is not supported", choose(*urls)),
            (20, "not base64", choose(f"{uri}####", f"{uri}abc", "data:;base64,é")),
            (30, f"{kind} without a source", choose("", f"a\0{suffix}", {}, {"a": 1}, f"data:{kind}/x,abc", uri)),
            (30, f"{kind} is not text", choose(*no_text)),
        ]
        return [(-(-count // share), reason, draw) for count, reason, draw in cases]

    def list_bad_rows(self, share: int) -> BadRows:
        """Rows with more places than media, with columns that exclude each other, and with a block of no kind."""
        kind, path = self.kind, f"a{self.suffix}"
        places, question = f"more places for {kind}s than {kind}s", f"<{kind}>Which?"
        rows: BadRows = [
            (20, places, {**build_row(f"<{kind}><{kind}>?"), f"{kind}s": [path]}),
            (20, places, build_row([{"type": kind}])),
            (10, "content is not text", build_row([{"type": f"{kind}x", kind: path}])),
            (10, "duplicate column", {**build_row(question), f"{kind}s": [path], kind: path}),
        ]
        return [(-(-count // share), reason, row) for count, reason, row in [*rows, *self.rows]]


def build_row(content: Any) -> dict[str, Any]:
    """A row with a question."""
    return {"messages": [{"role": "user", "content": content}, ANSWER]}


def encode(image: Image.Image, form: str, **settings: Any) -> bytes:
    """The bytes of an image file."""
    buffer = io.BytesIO()
    image.save(buffer, form, **settings)
    return buffer.getvalue()


def draw_noise(draw: random.Random, mode: str = "RGB", size: tuple[int, int] = (40, 32)) -> Image.Image:
    """An image whose file is mostly pixels, since noise cannot be compressed."""
    return Image.frombytes("RGB", size, draw.randbytes(size[0] * size[1] * 3)).convert(mode)


def build_png(width: int, height: int, pixels: bytes = b"", chunk: bytes = b"") -> bytes:
    """A PNG file with these pixels as they are compressed, and another chunk before them."""
    header = build_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk + build_chunk(b"IDAT", pixels) + build_chunk(b"IEND", b"")


def build_chunk(name: bytes, data: bytes) -> bytes:
    """A chunk of a PNG file."""
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def build_bmp(width: int, height: int) -> bytes:
    """The header of a BMP file."""
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + header


def build_gif(width: int, height: int) -> bytes:
    """A GIF file without pixels."""
    frame = b",\0\0\0\0" + struct.pack("<HH", width, height) + b"\0\x02\x02L\x01\0;"
    return b"GIF89a" + struct.pack("<HHBBB", width, height, 0, 0, 0) + frame


def build_jpeg(width: int, height: int) -> bytes:
    """A JPEG file with another size in its header."""
    data = bytearray(encode(Image.new("RGB", (16, 16)), "JPEG"))
    start = data.index(b"\xff\xc0") + 5
    data[start : start + 4] = struct.pack(">HH", height, width)
    return bytes(data)


def build_pickle(marker: Path) -> bytes:
    """A pickle that writes a file when it is loaded."""

    class Hostile:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.system, (f"touch {marker}",)

    return pickle.dumps(Hostile())


def store(build: Callable[[random.Random], bytes]) -> Draw:
    """Write the bytes to a file; the source is its name."""

    def draw(number: random.Random, path: Path) -> str:
        path.write_bytes(build(number))
        return path.name

    return draw


def cut(form: str, low: float, high: float, **settings: Any) -> Draw:
    """A file cut at a random place between two fractions of it."""

    def build(draw: random.Random) -> bytes:
        data = encode(draw_noise(draw), form, **settings)
        return data[: max(1, int(len(data) * draw.uniform(low, high)))]

    return store(build)


def link(target: str) -> Draw:
    """A symbolic link."""

    def draw(_number: random.Random, path: Path) -> str:
        path.symlink_to(target)
        return path.name

    return draw


def make_pipe(_number: random.Random, path: Path) -> str:
    """A pipe, whose reader would wait forever."""
    os.mkfifo(path)
    return path.name


def make_folder(_number: random.Random, path: Path) -> str:
    """A folder with the name of an image."""
    path.mkdir()
    return path.name


def run_command(draw: random.Random, path: Path) -> str:
    """A pickle, a PostScript program or a page, with the name of an image, that would write a file."""
    marker = path.parent / MARKER
    hostile = [
        build_pickle(marker),
        f"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n({marker}) (w) file closefile\n%%EOF".encode(),
        f"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/>{marker}</svg>".encode(),
        f"#!/bin/sh\ntouch {marker}\n".encode(),
        f"push graphic-context\nimage over 0,0 0,0 '|touch {marker}'\n".encode(),
        b"#define x_width 9\n#define x_height 9\nstatic char x_bits[] = {0};",
    ]
    path.write_bytes(draw.choice(hostile))
    return path.name


def expand(draw: random.Random) -> bytes:
    """A small PNG file whose text or color profile is 64 MB."""
    kind = draw.choice([b"zTXt", b"iCCP"])
    return build_png(8, 8, zlib.compress(bytes(8 * 25)), build_chunk(kind, b"a\0\0" + zlib.compress(bytes(64 << 20))))


def write_uri(build: Callable[[random.Random], bytes]) -> Draw:
    """The bytes as a data URI."""
    return lambda draw, _path: "data:image/png;base64," + base64.b64encode(build(draw)).decode()


def choose(*sources: Any) -> Draw:
    """One of these sources."""
    return lambda draw, _path: draw.choice(sources)


BAD: Cases = [
    (20, UNREADABLE, store(lambda _: b"")),
    (55, UNREADABLE, store(lambda draw: b"an image of a cat " * draw.randint(1, 50))),
    (60, UNREADABLE, store(lambda draw: draw.randbytes(draw.randint(1, 3000)))),
    (60, UNREADABLE, store(lambda draw: b"\x89PNG\r\n\x1a\n" + draw.randbytes(draw.randint(0, 300)))),
    (60, UNREADABLE, run_command),
    (4, UNREADABLE, store(expand)),
    (40, UNREADABLE, cut("PNG", 0.2, 0.9)),
    (40, UNREADABLE, cut("WEBP", 0.0, 0.99)),
    (20, UNREADABLE, cut("JPEG", 0.0, 0.1)),
    (20, UNREADABLE, cut("GIF", 0.0, 0.2)),
    (20, UNREADABLE, cut("TIFF", 0.2, 0.9, compression="tiff_lzw")),
    (10, UNREADABLE, store(lambda draw: build_png(*draw.choice([(0, 0), (0, 5), (5, 0)]), zlib.compress(b"")))),
    (10, UNREADABLE, store(lambda draw: draw.choice([build_bmp(0, 0), build_gif(0, 0), build_jpeg(0, 0)]))),
    (10, UNREADABLE, store(lambda draw: draw.choice([b"P6 0 0 255\n", b"P6 -4 5 255\n", b"P6 4", b"P6 a b c\n"]))),
    (10, UNREADABLE, write_uri(lambda draw: draw.randbytes(100))),
    (3, UNREADABLE, write_uri(lambda _: bytes(6 << 20))),
    (16, HUGE, store(lambda draw: build_png(draw.randint(20_000, 2**31 - 1), draw.randint(20_000, 2**31 - 1)))),
    (8, HUGE, store(lambda draw: build_bmp(draw.randint(20_000, 2**30), draw.randint(20_000, 2**30)))),
    (8, HUGE, store(lambda draw: build_gif(draw.randint(20_000, 65_535), 65_535))),
    (8, HUGE, store(lambda draw: build_jpeg(draw.randint(20_000, 65_535), 65_535))),
    (8, HUGE, store(lambda draw: f"P6 {draw.randint(20_000, 10**9)} 99999 255\n".encode())),
    (8, HUGE, write_uri(lambda draw: build_png(draw.randint(20_000, 2**20), 9_999))),
    (20, NARROW, store(lambda draw: encode(Image.new("RGB", (draw.randint(500, 900), 2)), "PNG"))),
    (67, DURING_TRAINING, cut("BMP", 0.3, 0.95)),
    (30, DURING_TRAINING, cut("JPEG", 0.7, 0.95)),
    (30, DURING_TRAINING, cut("PPM", 0.3, 0.95)),
]
GOOD: list[Draw] = [
    *(store(lambda draw, mode=mode: encode(draw_noise(draw, mode), "PNG")) for mode in ("1", "L", "LA", "P", "RGBA")),  # type: ignore[misc]
    *(store(lambda draw, form=form: encode(draw_noise(draw), form)) for form in ("WEBP", "GIF", "BMP", "TIFF", "PPM")),  # type: ignore[misc]
    store(lambda draw: encode(draw_noise(draw, "CMYK"), "JPEG")),
    store(lambda draw: encode(draw_noise(draw, "F"), "TIFF")),
    store(lambda draw: encode(Image.frombytes("I;16", (40, 32), draw.randbytes(2560)), "PNG")),
    store(lambda draw: encode(draw_noise(draw), "GIF", save_all=True, append_images=[draw_noise(draw)] * 3)),
    store(lambda draw: encode(draw_noise(draw), "PNG", save_all=True, append_images=[draw_noise(draw)] * 3)),
    store(lambda draw: encode(draw_noise(draw), "WEBP", save_all=True, append_images=[draw_noise(draw)] * 3)),
    store(lambda draw: encode(draw_noise(draw), "PNG")[:-3]),  # without its last bytes, all pixels are there
    store(lambda draw: encode(draw_noise(draw), "JPEG", progressive=True)),
    write_uri(lambda draw: encode(draw_noise(draw), "PNG")),
]
BAD_ROWS: BadRows = [
    (10, "not one place for each image", build_row("<image>?")),
    (10, "audio data is not supported", {**build_row("?"), "audios": ["a.wav"]}),
]
IMAGES = BadMedia("image", "image", UNREADABLE, ".png", BAD, GOOD, BAD_ROWS)


def write_bad_rows(folder: Path, media: BadMedia, *, copies: int, share: int = 1) -> Counter[str]:
    """Write `rows.jsonl` and its media into a folder.

    Args:
        copies: good rows of each kind.
        share: one of so many of the usual bad sources and rows are written.

    Returns:
        The number of rows for each reason; of good rows by an empty reason.
    """
    folder.mkdir()
    draw = random.Random(1)
    expected, rows = Counter[str](), list[dict[str, Any]]()
    cases = [*media.bad, *media.list_bad_sources(share), *((copies, "", build) for build in media.good)]
    media.good[0](draw, folder / f"a{media.suffix}")
    for number, (count, reason, build) in enumerate(cases):
        expected[reason] += count
        for index in range(count):
            source = build(draw, folder / f"{media.kind}{number}_{index}{media.suffix}")
            row = build_row(f"<{media.kind}>Which?")
            rows.append({**row, f"{media.kind}s": [source], "caption_id": index})
    for count, reason, row in media.list_bad_rows(share):
        expected[reason] += count
        rows += [row] * count
    draw.shuffle(rows)
    write_rows(folder, json.loads(json.dumps(rows)))
    return expected
