"""Preprocessing of images equals the processors of transformers to the bit."""

import json
import random
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from torch import Tensor
from transformers.image_utils import SizeDict
from transformers.models.got_ocr2.image_processing_got_ocr2 import get_optimal_tiled_canvas
from transformers.models.llama4.image_processing_llama4 import (
    find_supported_resolutions,
    get_best_fit,
    get_max_res_without_distortion,
)

from litgpt.data.media.canvases import interpolate_numbers
from litgpt.data.media.patches import cut_patches
from litgpt.data.media.picture_settings import PictureSettings, read_picture_settings
from litgpt.data.media.picture_sizes import SIZE_RULES, find_tile_grid, fit_tiles
from litgpt.data.media.pictures import (
    get_size,
    normalize_picture,
    open_picture,
    plan_picture,
    resize_picture,
)
from litgpt.errors import UserError
from litgpt.model.tower_config import TowerShape

SIZES = [(40, 60), (61, 37), (96, 96), (25, 200), (300, 451), (128, 64), (33, 33), (180, 320), (9, 14), (77, 201)]
PROCESSORS: dict[str, dict[str, Any]] = {
    "CLIPImageProcessor": {"size": {"shortest_edge": 56}, "crop_size": {"height": 48, "width": 56}},
    "LlavaNextImageProcessor": {
        "size": {"shortest_edge": 56},
        "crop_size": {"height": 56, "width": 56},
        "image_grid_pinpoints": [[56, 112], [112, 56], [112, 112], [168, 56], [56, 168]],
    },
    "LlavaOnevisionImageProcessor": {
        "size": {"height": 56, "width": 56},
        "image_grid_pinpoints": [[56, 112], [112, 56], [112, 112], [168, 56], [56, 168], [168, 168]],
    },
    "BitImageProcessor": {"size": {"shortest_edge": 64}, "crop_size": {"height": 56, "width": 56}},
    "SiglipImageProcessor": {"size": {"height": 48, "width": 64}},
    "Gemma3ImageProcessor": {"size": {"height": 56, "width": 56}},
    "PixtralImageProcessor": {"size": {"longest_edge": 150}, "patch_size": {"height": 28, "width": 28}},
    "GotOcr2ImageProcessor": {"size": {"height": 48, "width": 32}, "max_patches": 7, "crop_to_patches": True},
    "Qwen2VLImageProcessor": {"size": {"shortest_edge": 4 * 784, "longest_edge": 40 * 784}},
    "Glm4vImageProcessor": {"size": {"shortest_edge": 8 * 784, "longest_edge": 60 * 784}},
    "Idefics3ImageProcessor": {"size": {"longest_edge": 160}, "max_image_size": {"longest_edge": 64}},
    "SmolVLMImageProcessor": {"size": {"longest_edge": 96}, "max_image_size": {"longest_edge": 96}},
    "Llama4ImageProcessor": {"size": {"height": 56, "width": 56}, "max_patches": 7},
    "JanusImageProcessor": {"size": {"height": 56, "width": 56}},
}
PATCHES = {"width": 8, "layers": 1, "heads": 2, "mlp_size": 8, "blocks_run": 1, "patch": 14, "merge": 2, "temporal": 2}
SHAPE = TowerShape.from_values({**PATCHES, "image_token": 1})


def draw_image(height: int, width: int, mode: str = "RGB") -> Image.Image:
    """A drawn image: a gradient, noise, and sharp edges."""
    generator = torch.Generator().manual_seed(height * width)
    values = torch.rand(height, width, 3, generator=generator) * 60 + torch.linspace(0, 190, width)[:, None]
    values[height // 3 : height // 2] = 255
    return Image.fromarray(values.to(torch.uint8).numpy()).convert(mode)


def compute_expected(processor: Any, image: Any) -> Tensor:
    """What a processor of transformers makes of an image: (patches, P) for Qwen's, else (tiles, C, H, W)."""
    pixels = processor([[image]] if "Idefics" in type(processor).__name__ else [image], return_tensors="pt")
    values = pixels["pixel_values"].float()  # of Llama 4 in bfloat16
    return values[0] if values.dim() == 5 else values


def compute_actual(pixels: Tensor, settings: PictureSettings) -> Tensor:
    """Our form of the same."""
    pictures = resize_picture(pixels, settings, 28)
    if settings.rule in ("area", "volume"):
        (picture,) = pictures
        return cut_patches(normalize_picture(picture, settings)[None], SHAPE)[0]
    return torch.stack([normalize_picture(picture, settings) for picture in pictures])


@pytest.mark.parametrize("kind", PROCESSORS)
def test_equal_to_the_published_processor(kind: str, tmp_path: Path) -> None:
    processor = getattr(transformers, kind)(**PROCESSORS[kind])
    processor.save_pretrained(tmp_path)
    settings = read_picture_settings(tmp_path)
    for size in SIZES:
        image = draw_image(*size)
        assert torch.equal(compute_actual(open_picture(image), settings), compute_expected(processor, image)), size


@pytest.mark.slow
@pytest.mark.parametrize("kind", PROCESSORS)
def test_photos_with_the_default_settings(kind: str, tmp_path: Path) -> None:
    datasets = pytest.importorskip("sklearn.datasets")
    settings_of_folders = ("patch_size", "crop_to_patches")
    kept = {key: value for key, value in PROCESSORS[kind].items() if key in settings_of_folders}
    if "image_grid_pinpoints" in PROCESSORS[kind]:  # the default size is not that of the default canvases
        kept = PROCESSORS[kind]
    processor = getattr(transformers, kind)(**kept)
    processor.save_pretrained(tmp_path)
    settings = read_picture_settings(tmp_path)
    for photo in datasets.load_sample_images().images:
        image = Image.fromarray(photo)
        for view in (image, image.crop((0, 0, 201, 400)), image.resize((1300, 350))):
            assert torch.equal(compute_actual(open_picture(view), settings), compute_expected(processor, view))


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "RGBA", "LA", "1", "I;16"])
def test_modes_become_three_channels(mode: str) -> None:
    source = draw_image(12, 20, "L" if mode == "I;16" else mode)
    image = source.convert("I;16") if mode == "I;16" else source
    pixels = open_picture(image)
    assert pixels.shape == (3, 12, 20) and pixels.dtype == torch.uint8
    if mode in ("L", "CMYK", "RGBA"):
        expected = torch.tensor(np.asarray(source.convert("RGB")))
        assert torch.equal(pixels, expected.permute(2, 0, 1))


def test_transparent_pixels_are_white() -> None:
    pixels = open_picture(Image.new("RGBA", (2, 2), (255, 0, 0, 0)))
    assert pixels.unique().tolist() == [255]
    half = open_picture(Image.new("RGBA", (1, 1), (255, 0, 0, 128)))
    assert half.flatten().tolist() == [255, 127, 127]


def test_turned_as_exif_says() -> None:
    image, stored = draw_image(10, 20), BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(stored, "PNG", exif=exif)
    pixels = open_picture(stored.getvalue())
    assert torch.equal(pixels, open_picture(image).rot90(-1, (1, 2)))


@pytest.mark.parametrize("data", [b"", b"text", b"\x89PNG\r\n\x1a\n", "cut"])
def test_broken_files(data: bytes | str, tmp_path: Path) -> None:
    stored = BytesIO()
    draw_image(40, 40).save(stored, "PNG")
    path = tmp_path / "a.png"
    path.write_bytes(stored.getvalue()[:300] if isinstance(data, str) else data)
    with pytest.raises(UserError, match=r"a\.png: not an image that can be read"):
        open_picture(path)


def test_sizes_of_qwen() -> None:
    limits = {"shortest_edge": 3136, "longest_edge": 1003520}
    tokens = {(300, 451): 176, (1080, 1920): 1222, (2000, 3000): 1247, (64, 64): 4, (37, 400): 14}
    for size, count in tokens.items():
        height, width = SIZE_RULES["area"](size, limits, 28)
        assert height * width // 28**2 == count
    with pytest.raises(UserError, match="too narrow"):
        SIZE_RULES["area"]((1, 300), limits, 28)


@pytest.mark.parametrize(
    "kind", ["Qwen2VLImageProcessor", "Glm4vImageProcessor", "Idefics3ImageProcessor", "SmolVLMImageProcessor"]
)
def test_numbers_of_patches_and_tiles_of_random_sizes(kind: str, tmp_path: Path) -> None:
    processor, draw = getattr(transformers, kind)(), random.Random(0)
    processor.save_pretrained(tmp_path)
    settings = read_picture_settings(tmp_path)
    for _ in range(200):
        size = draw.randint(20, 3000), draw.randint(20, 3000)
        height, width = SIZE_RULES[settings.rule](size, settings.limits, 28)
        if settings.tile is None:
            assert height * width // 14**2 == processor.get_number_of_image_patches(*size)
            continue
        height, width = fit_tiles((height, width), settings.tile)
        rows, columns = height // settings.tile, width // settings.tile
        whole = int(rows * columns > 1)
        expected = (rows * columns + whole, rows if whole else 1, columns if whole else 1)
        assert tuple(map(int, processor.get_number_of_image_patches(*size))) == expected


def test_canvases_of_random_sizes_are_those_of_llama4(tmp_path: Path) -> None:
    transformers.Llama4ImageProcessor().save_pretrained(tmp_path)
    settings, draw, side = read_picture_settings(tmp_path), random.Random(0), 336
    canvases = torch.tensor(find_supported_resolutions(16, SizeDict(height=side, width=side)))
    for _ in range(500):
        size = draw.randint(1, 3000), draw.randint(1, 3000)
        if draw.random() < 0.5:  # several canvases are equally good
            size = draw.choice([112, 168, 336, 1008]), draw.choice([84, 336, 672, 2688])
        canvas: Any = get_best_fit(size, canvases)
        limits = tuple(min(max(length, side), most) for length, most in zip(size, canvas, strict=True))
        expected = tuple(max(int(length), 1) for length in get_max_res_without_distortion(size, limits))
        plan, tiles = plan_picture(size, settings, 28), int(canvas.prod()) // side**2
        assert plan.corner == tuple(canvas.tolist()) and plan.size == expected, size
        assert len(plan.pictures) == tiles + (tiles > 1)


def build_features_processor(kind: str) -> tuple[Any, TowerShape, int]:
    """A processor of transformers without a tokenizer, and the tower and the side of the tiles that it is for."""
    processor = object.__new__(getattr(transformers, f"{kind}Processor"))
    shape = {**PATCHES, "merge": 1, "temporal": 1, "line_break": True, "image_token": 1}
    if kind == "LlavaNext":
        settings = {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}
        processor.image_processor = transformers.LlavaNextImageProcessor(**settings)
        processor.patch_size, processor.num_additional_image_tokens = 14, 0
        return processor, TowerShape.from_values(shape), 336
    processor.image_processor = transformers.LlavaOnevisionImageProcessor()
    processor.num_image_tokens, processor.vision_aspect_ratio = 27**2, "anyres_max_9"
    return processor, TowerShape.from_values({**shape, "canvas_tiles": 9}), 384


@pytest.mark.parametrize("kind", ["LlavaNext", "LlavaOnevision"])
def test_numbers_of_places_on_canvases(kind: str, tmp_path: Path) -> None:
    (processor, shape, side), draw = build_features_processor(kind), random.Random(0)
    processor.image_processor.save_pretrained(tmp_path)
    settings = read_picture_settings(tmp_path)
    for _ in range(100):
        size = draw.randint(20, 3000), draw.randint(20, 3000)
        (places, *others) = plan_picture(size, settings, 14).build_order(shape).counts
        assert not any(others) and places == processor._get_number_of_features(*size, side, side)


def test_images_of_a_sample_of_several(tmp_path: Path) -> None:
    processor = transformers.LlavaOnevisionImageProcessor(**PROCESSORS["LlavaOnevisionImageProcessor"])
    processor.save_pretrained(tmp_path)
    settings, images = read_picture_settings(tmp_path), [draw_image(*size) for size in SIZES]
    expected = processor([images], return_tensors="pt")["pixel_values"]
    for image, (tile,) in zip(images, expected, strict=True):
        (picture,) = resize_picture(open_picture(image), settings, 14, alone=False)
        assert torch.equal(normalize_picture(picture, settings), tile)


@pytest.mark.parametrize(
    ("kind", "size"), [("CLIPImageProcessor", (2, 400_000)), ("LlavaOnevisionImageProcessor", (9_500, 100))]
)
def test_images_that_would_become_too_large(kind: str, size: tuple[int, int], tmp_path: Path) -> None:
    getattr(transformers, kind)(**PROCESSORS[kind]).save_pretrained(tmp_path)
    settings = read_picture_settings(tmp_path)
    with pytest.raises(UserError, match=r"pixels: it would become one of .*; use one whose long side is shorter"):
        plan_picture(size, settings, 14, alone=False)
    assert plan_picture((1_000, 1_500), settings, 14, alone=False).pictures


@pytest.mark.parametrize("size", [(3, 5), (27, 40), (54, 9)])
def test_interpolated_features(size: tuple[int, int]) -> None:
    features_DHW = torch.randn(2, 27, 54, generator=torch.Generator().manual_seed(0))
    expected = torch.nn.functional.interpolate(features_DHW[None], size, mode="bilinear")[0]
    numbers, weights = interpolate_numbers(torch.arange(27 * 54).view(27, 54), size)
    actual = (features_DHW.flatten(1)[:, numbers] * weights).sum(-1)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


def test_canvases_that_cannot_be_cut(tmp_path: Path) -> None:
    given = {"image_processor_type": "LlavaNextImageProcessor", "size": {"shortest_edge": 336}}
    crop = {"crop_size": {"height": 336, "width": 336}}
    for change, message in (
        ({**crop, "image_grid_pinpoints": [[336, 600]]}, "use multiples of 336"),
        ({"crop_size": {"height": 224, "width": 224}}, "crop_size: .* is not supported; use one side"),
    ):
        (tmp_path / "preprocessor_config.json").write_text(json.dumps({**given, **change}))
        with pytest.raises(UserError, match=message):
            read_picture_settings(tmp_path)


def test_settings_of_older_files_and_those_that_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "preprocessor_config.json"
    with pytest.raises(UserError, match="has no preprocessor_config"):
        read_picture_settings(tmp_path)
    older = {"image_processor_type": "Qwen2VLImageProcessorFast", "min_pixels": 784, "max_pixels": 7840}
    path.write_text(json.dumps(older))
    settings = read_picture_settings(tmp_path)
    assert settings.limits == {"shortest_edge": 784, "longest_edge": 7840}
    assert get_size(resize_picture(torch.zeros(3, 200, 300, dtype=torch.uint8), settings, 28)[0]) == (56, 84)
    for change, message in (
        ({"image_processor_type": "OtherImageProcessor"}, "OtherImageProcessor is not supported"),
        ({"do_resize": False}, "do_resize: false is not supported"),
        ({"resample": 0}, "resample: 0"),
        ({"image_processor_type": "CLIPImageProcessor", "crop_size": {"height": 300, "width": 224}}, "crop_size: 300"),
        ({"image_processor_type": "Llama4ImageProcessor", "resize_to_max_canvas": True}, "resize_to_max_canvas: True"),
        (
            {"image_processor_type": "Llama4ImageProcessor", "max_patches": 0},
            "max_patches: 0 is not supported; use 1 to 256",
        ),
        ({"image_processor_type": "Llama4ImageProcessor", "size": {"height": 28, "width": 56}}, "use the same height"),
    ):
        path.write_text(json.dumps({**older, **change}))
        with pytest.raises(UserError, match=message):
            read_picture_settings(tmp_path)


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("Llama4", {"size": 336}, "size: 336 is not supported; set height and width, in pixels"),
        ("Llama4", {"size": {"longest_edge": 336}}, "set height and width"),
        ("Llama4", {"max_patches": 257}, "max_patches: 257 is not supported; use 1 to 256"),
        ("Siglip", {"size": {"height": 0, "width": 0}}, "size: .* set height and width"),
        ("Siglip", {"image_mean": 0.5}, "image_mean: 0.5 is not supported; use three numbers"),
        ("Siglip", {"image_std": [0.5, 0, 0.5]}, "image_std: .* use three numbers"),
        ("Siglip", {"rescale_factor": 0}, "rescale_factor: 0 is not supported; use e.g. 0.0039"),
        ("Siglip", {"resample": [3]}, r"resample: \[3\] is not supported"),
        ("CLIP", {"size": 224}, "size: 224 is not supported; set shortest_edge"),
        ("CLIP", {"crop_size": 224}, "crop_size: 224 is not supported; set height and width"),
        ("Qwen2VL", {"size": "large"}, "size: large is not supported; set shortest_edge and longest_edge"),
        ("Glm4v", {"temporal_patch_size": 0}, "temporal_patch_size: 0 is not supported; use 1 to 256"),
        ("GotOcr2", {"max_patches": 10**6}, "max_patches: 1000000 is not supported; use 1 to 256"),
        ("GotOcr2", {"min_patches": 13}, "min_patches: 13 is not supported; use 1 to 12"),
        ("Idefics3", {"max_image_size": {"height": 364}}, "max_image_size: .* set longest_edge"),
        ("Janus", {"min_size": 385}, "min_size: 385 is not supported; use 1 to 384"),
        ("Janus", {"size": {"height": 384, "width": 336}}, "use the same height and width"),
        ("Janus", {"do_pad": False}, "do_pad: false is not supported"),
        ("LlavaNext", {"size": {"shortest_edge": 224}, "image_grid_pinpoints": [224]}, "use pairs of multiples of 224"),
    ],
)
def test_settings_of_wrong_types(kind: str, change: dict[str, Any], message: str, tmp_path: Path) -> None:
    values = {"image_processor_type": f"{kind}ImageProcessor", **change}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=message):
        read_picture_settings(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_processor": [values]}))
    with pytest.raises(UserError, match="download the file again"):
        read_picture_settings(tmp_path)


def test_the_canvas_of_a_narrow_image_is_no_larger_than_the_largest_image(tmp_path: Path) -> None:
    values = {"image_processor_type": "JanusImageProcessor", "size": {"height": 100_000, "width": 100_000}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match="1 x 5000 pixels: it would become one of 100000 x 100000, more than"):
        plan_picture((1, 5000), read_picture_settings(tmp_path), 14)


def test_tiles_of_random_sizes_are_those_of_transformers() -> None:
    draw = random.Random(0)
    for _ in range(500):
        size, tile = ((draw.randint(1, 900), draw.randint(1, 900)) for _ in range(2))
        if draw.random() < 0.5:  # several grids are equally near
            size = tuple(draw.choice([32, 64, 96, 128]) for _ in range(2))
            tile = (64, 64)
        least, most = draw.randint(1, 3), draw.randint(3, 12)
        columns, rows = get_optimal_tiled_canvas(size, tile, least, most)
        assert find_tile_grid(size, tile, least, most) == (rows, columns)
