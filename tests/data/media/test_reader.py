"""Images by their headers: the same sizes as by their pixels, and one line for files that are none."""

import base64
import io
import json
import os
import random
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from litgpt.data.media.picture_settings import read_picture_settings
from litgpt.data.media.pictures import (
    get_size,
    open_picture,
    plan_picture,
    read_picture_size,
    resize_picture,
)
from litgpt.data.media.reader import MediaReader, open_media_reader
from litgpt.data.read.media import Medium
from litgpt.errors import UserError
from litgpt.model.feature_order import join_orders
from litgpt.model.tower_config import TowerShape
from tests.vision_model import KINDS, write_vision_model

VISION: dict[str, Any] = {"width": 16, "layers": 1, "heads": 2, "mlp_size": 16, "blocks_run": 1, "patch": 4, "merge": 2}


def build_reader(folder: Path, kind: str) -> MediaReader:
    (folder / "preprocessor_config.json").write_text(json.dumps(KINDS[kind]["processor"]))
    return MediaReader(read_picture_settings(folder), TowerShape.from_values({**VISION, "image_token": 9}), False)


def encode(size: tuple[int, int], form: str = "PNG", **settings: Any) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (200, 30, 90)).save(buffer, form, **settings)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", KINDS)
def test_plans_are_those_of_the_pixels(kind: str, tmp_path: Path) -> None:
    reader, draw = build_reader(tmp_path, kind), random.Random(0)
    for _ in range(40):
        height, width = draw.randint(1, 90), draw.randint(1, 90)
        if max(height, width) > 40 * min(height, width):
            continue
        pixels = torch.zeros(3, height, width, dtype=torch.uint8)
        plan = plan_picture((height, width), reader.settings, 8)
        pictures = resize_picture(pixels, reader.settings, 8)
        assert list(plan.pictures) == [get_size(picture) for picture in pictures]
        assert len(pictures) == (plan.rows * plan.columns + 1 if plan.rows else 1)


def test_a_turned_image_is_read_by_its_header() -> None:
    turned = Image.Exif()
    turned[0x0112] = 6
    source = encode((24, 8), "JPEG", exif=turned)
    assert read_picture_size(source) == get_size(open_picture(source)) == (24, 8)
    assert read_picture_size(encode((24, 8), "JPEG")) == (8, 24)


def test_a_changed_image_is_noticed(tmp_path: Path) -> None:
    reader, path = build_reader(tmp_path, "qwen2_vl"), tmp_path / "a.png"
    path.write_bytes(encode((24, 16)))
    medium = Medium(path=str(path))
    grids = reader.list_grids(reader.plan(medium))
    assert grids == ((1, 4, 6),) and reader.read(medium, grids).shape == (24, 48)
    in_row = Medium(data=base64.b64encode(path.read_bytes()).decode())
    assert torch.equal(reader.read(in_row, grids), reader.read(medium, grids))
    path.write_bytes(encode((32, 16)))
    with pytest.raises(UserError, match=r"a\.png: not of the size that it had when the data was prepared"):
        reader.read(medium, grids)


def test_order_of_features_on_a_canvas(tmp_path: Path) -> None:
    shape = TowerShape.from_values({**VISION, "merge": 1, "line_break": True, "image_token": 9})
    reader, path = MediaReader(build_reader(tmp_path, "llava_next").settings, shape, False), tmp_path / "a.png"
    path.write_bytes(encode((32, 16)))
    medium = Medium(path=str(path))
    grids = reader.list_grids(reader.plan(medium))
    assert grids == ((1, 4, 4),) * 3  # the whole and two tiles
    order = reader.read_order(medium, grids, 16 + 4 * (8 + 1))
    assert order is not None and order.weights_MK is None and order.counts == (52, 0, 0)
    numbers = order.numbers_MK[:, 0].tolist()
    assert numbers[:25] == [*range(20), *range(32, 36), -1]
    both = join_orders([order, order])
    assert both is not None and both.counts == (52, 0, 0, 52, 0, 0)
    assert both.numbers_MK[:, 0].tolist() == [*numbers, *(number if number < 0 else number + 48 for number in numbers)]
    path.write_bytes(encode((32, 8)))  # margins above and below, in the same tiles
    assert reader.read(medium, grids).shape == (48, 48)
    with pytest.raises(UserError, match=r"a\.png: not of the size that it had when the data was prepared"):
        reader.read_order(medium, grids, 52)


def test_canvases_of_the_processor_are_those_of_the_model(tmp_path: Path) -> None:
    folder = write_vision_model(tmp_path / "model", "llava_next")
    values = json.loads((folder / "preprocessor_config.json").read_text())
    values["image_grid_pinpoints"].pop()
    (folder / "preprocessor_config.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=r"image_grid_pinpoints: \[\[16, 32\], \[32, 16\]\] of the processor are not"):
        open_media_reader(folder)


def write_huge_png() -> bytes:
    """A PNG of 50,000 x 50,000 pixels in 60 bytes."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))


BAD = {
    "empty": b"",
    "text": b"not an image",
    "huge": write_huge_png(),
    "narrow": encode((900, 2)),
    "script": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n(touch) run\n%%EOF\n",
    "page": b"<svg xmlns='http://www.w3.org/2000/svg' width='1' height='1'/>",
    "header alone": encode((24, 16))[:20],
}


@pytest.mark.parametrize("name", BAD)
def test_files_that_are_no_image(name: str, tmp_path: Path) -> None:
    reader = build_reader(tmp_path, "qwen2_vl")
    (tmp_path / "a.png").write_bytes(BAD[name])
    for medium in (Medium(path=str(tmp_path / "a.png")), Medium(data=base64.b64encode(BAD[name]).decode())):
        with pytest.raises(UserError) as raised:
            reader.plan(medium)
        assert "\n" not in str(raised.value) and len(str(raised.value)) < 400


def test_other_files(tmp_path: Path) -> None:
    reader = build_reader(tmp_path, "qwen2_vl")
    os.mkfifo(tmp_path / "pipe")
    sources = [Medium(path=str(tmp_path / name)) for name in ("pipe", "missing", ".", "a" * 300)]
    for medium in [*sources, Medium(data="!"), Medium(data="abc")]:
        with pytest.raises(UserError):
            reader.plan(medium)


def test_a_truncated_image_has_a_size_and_no_pixels(tmp_path: Path) -> None:
    reader, whole = build_reader(tmp_path, "qwen2_vl"), encode((64, 64), "BMP")
    medium = Medium(data=base64.b64encode(whole[: len(whole) // 2]).decode())
    grids = reader.list_grids(reader.plan(medium))
    with pytest.raises(UserError, match="not an image that can be read"):
        reader.read(medium, grids)
