"""Compare images and videos with transformers: pixels by a folder's processors, and the logits of a text with them."""

import random
from dataclasses import dataclass, replace
from inspect import signature
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from litgpt.data.media.containers import VideoHeader
from litgpt.data.media.patches import count_places, cut_patches, pack_media
from litgpt.data.media.picture_settings import read_picture_settings
from litgpt.data.media.pictures import (
    get_size,
    normalize_picture,
    open_picture,
    plan_picture,
    resize_picture,
)
from litgpt.data.media.positions import build_media_positions
from litgpt.data.media.reader import MediaReader
from litgpt.data.media.videos import VideoPlan, VideoSettings, plan_video, read_video_settings, resize_frame
from litgpt.infer.requests import name_media_tokens
from litgpt.model.config import Config
from litgpt.model.feature_order import join_orders
from litgpt.model.gpt import GPT
from litgpt.model.media import Media
from litgpt.model.tower_config import TowerShape
from litgpt.store.load_model import load_model

VIDEO_RATE = 4.0  # frames a second of drawn videos


@dataclass(frozen=True)
class ComparedMedia:
    """Drawn media of one kind, as both libraries read them.

    Attributes:
        sizes: of each, width and height in pixels, before them the number of frames of a video.
        media: as we read them, and `seconds` of a step of frames of each.
        inputs: as the model of transformers takes them.
        same_pixels: whether both are equal to the bit.
    """

    kind: str
    sizes: list[tuple[int, ...]]
    media: Media
    seconds: list[float]
    inputs: Any
    same_pixels: bool


def compare_images(folder: Path, config: Config, seed: int) -> ComparedMedia:
    """Two drawn images by the folder's processor."""
    from PIL.Image import fromarray
    from transformers import AutoImageProcessor

    assert config.vision is not None
    reader = MediaReader(read_picture_settings(folder), TowerShape.from_values(config.vision), has_sections=False)
    images = [fromarray(values.numpy()) for values in draw_pixels(seed)]
    processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
    expected = processor(images=images, return_tensors="pt", **list_call_settings(reader))
    pictures, media = cut_images(reader, [open_picture(image) for image in images])
    # those of Llama 4 are bfloat16, which its model does not take in float32
    values = expected["pixel_values"] = expected["pixel_values"].float()
    if "image_grid_thw" in expected:
        same = torch.equal(media.patches_NP, values)
    else:  # in a batch, smaller images have zeros at the right and below
        if reader.settings.canvases is None:
            values = values.flatten(0, -4)
        else:  # and those with fewer tiles have empty ones
            values = [each for row, tiles in zip(values, pictures, strict=True) for each in row[: len(tiles)]]
        pairs = zip(chain.from_iterable(pictures), values, strict=True)
        same = all(torch.equal(picture, padded[:, : picture.shape[1], : picture.shape[2]]) for picture, padded in pairs)
    seconds = [1.0] * len(media.grids)
    return ComparedMedia("image", [image.size for image in images], media, seconds, expected, same)


def cut_images(reader: MediaReader, images: list[Tensor]) -> tuple[list[list[Tensor]], Media]:
    """The normalized pictures (3, H, W) that the tower reads of each image, and the media of all images."""
    settings, unit = reader.settings, reader.shape.patch * reader.shape.merge
    resized = [resize_picture(pixels, settings, unit) for pixels in images]
    pictures = [[normalize_picture(each, settings) for each in tiles] for tiles in resized]
    cut = [[cut_patches(picture[None], reader.shape) for picture in tiles] for tiles in pictures]
    orders = [reader.order(plan_picture(get_size(pixels), settings, unit)) for pixels in images]
    return pictures, replace(pack_media(list(chain.from_iterable(cut))), order=join_orders(orders))


def list_call_settings(reader: MediaReader) -> dict[str, Any]:
    """The settings that the processor of a model passes to that of images, beside those in the file."""
    settings, unit = reader.settings, reader.shape.patch * reader.shape.merge
    cuts = {} if settings.tile_counts is None else {"crop_to_patches": True}
    return {**cuts, **({"patch_size": {"height": unit, "width": unit}} if settings.rule == "within" else {})}


def draw_pixels(seed: int) -> list[Tensor]:
    """Two images (H, W, 3) of different sizes, uint8: noise over a slope."""
    draw = torch.Generator().manual_seed(seed)
    return [
        (torch.rand(*size, 3, generator=draw) * 100 + torch.linspace(0, 155, size[1])[:, None]).to(torch.uint8)
        for size in ((48, 80), (120, 64))
    ]


def compare_videos(folder: Path, config: Config, seed: int) -> ComparedMedia:
    """Two drawn videos by the folder's processor, with the settings that are read of its file."""
    from transformers import AutoVideoProcessor

    assert config.vision is not None
    shape = TowerShape.from_values(config.vision)
    is_shared = shape.video_settings == "shared"
    settings = read_video_settings(folder, str(shape.video_processor), is_shared=is_shared)
    is_stacked = shape.line_break  # a model that takes the frames of all videos in one tensor, of as many each
    videos = [
        torch.stack([picture.permute(2, 0, 1).roll(3 * number, -1) for number in range(frames)])
        for picture, frames in zip(draw_pixels(seed), (12, 12 if is_stacked else 7), strict=True)
    ]
    sampling: dict[str, float] = {} if settings.num_frames is None else {"num_frames": settings.num_frames}
    if settings.num_frames is None or settings.rule == "long_side":  # where both are limits
        sampling["fps"] = settings.fps
    capped = {"cap_pixels_per_frame": settings.cap_pixels_per_frame} if shape.temporal > 1 else {}
    limits = {} if is_shared else {"size": dict(settings.limits)}  # as the processor of the model passes them
    call_settings: dict[str, Any] = {**capped, **limits}
    processor = AutoVideoProcessor.from_pretrained(folder, local_files_only=True)
    outputs = [
        processor(
            [video],
            video_metadata=[{"total_num_frames": len(video), "fps": VIDEO_RATE, "duration": len(video) / VIDEO_RATE}],
            do_sample_frames=True,
            return_tensors="pt",
            **call_settings,
            **sampling,
        )
        for video in videos
    ]
    if "video_grid_thw" in outputs[0]:
        inputs = {key: torch.cat([output[key] for output in outputs]) for key in outputs[0]}
        expected = inputs["pixel_values_videos"]
    elif is_stacked:
        inputs = {"pixel_values_videos": torch.cat([output["pixel_values_videos"] for output in outputs])}
        expected = cut_patches(inputs["pixel_values_videos"].flatten(0, 1), shape)[0]
    else:  # frames (F, C, H, W), which the model takes as images, or as those of one row
        key = next(key for key in ("pixel_values_videos", "pixel_values") if key in outputs[0])
        frames = torch.cat([output[key][0] for output in outputs])
        inputs = {"pixel_values": frames if key == "pixel_values_videos" else frames[None]}
        expected = cut_patches(frames, shape)[0]
    items, plans = zip(*(read_drawn_video(video, settings, shape) for video in videos), strict=True)
    order = join_orders([plan.build_order(shape) for plan in plans]) if shape.line_break else None
    media = replace(pack_media(items), order=order)
    same = torch.equal(media.patches_NP, expected)
    sizes: list[tuple[int, ...]] = [(len(video), video.shape[3], video.shape[2]) for video in videos]
    return ComparedMedia("video", sizes, media, [plan.seconds for plan in plans], inputs, same)


def read_drawn_video(
    frames_FCHW: Tensor, settings: VideoSettings, shape: TowerShape
) -> tuple[tuple[Tensor, tuple[int, int, int]], VideoPlan]:
    """The patches of a video with their grid, and its frames and their size."""
    size = frames_FCHW.shape[2], frames_FCHW.shape[3]
    plan = plan_video(VideoHeader(len(frames_FCHW), VIDEO_RATE, size, (), ()), settings, shape)
    resized = [resize_frame(frames_FCHW[frame], plan, settings) for frame in plan.frames]
    return cut_patches(normalize_picture(torch.stack(resized), settings), shape), plan


def compare_media_logits(
    reference: Any, folder: Path, config: Config, compared: ComparedMedia, seed: int
) -> tuple[float, float]:
    """The largest difference of logits from transformers, and its share of the largest logit, of a text with media.

    Args:
        reference: the model of transformers.
    """
    model = GPT(config).eval()
    load_model(model, folder)
    assert model.vision is not None
    shape, draw, media = model.vision.shape, random.Random(seed), compared.media
    words = sorted(set(range(min(config.vocab_size, config.padded_vocab_size or 0))) - name_media_tokens(config).keys())
    is_image = compared.kind == "image" or shape.video_token is None
    token = shape.image_token if is_image else shape.video_token
    assert token is not None
    ids = draw.choices(words, k=3)
    places_of_each = [count_places(grid, shape) for grid in media.grids] if media.order is None else media.order.counts
    for grid, places_of_one in zip(media.grids, places_of_each, strict=True):
        runs = grid[0] if shape.frame_runs else 1
        for _ in range(runs):
            ids += [token] * (places_of_one // runs) + draw.choices(words, k=2)
    positions = None
    if config.rope_sections:
        positions = build_media_positions(shape, ids, media.grids, seconds=compared.seconds)[None]
    ids_BT = torch.tensor([ids])
    places = {} if positions is None else {"position_ids": positions.transpose(0, 1)}
    prompts_BT = torch.arange(len(ids))[None] < len(ids) - 2  # the text after the last one is the answer
    if shape.has_blocks:
        places |= {"token_type_ids": (~prompts_BT if shape.prompt_blocks else ids_BT == shape.image_token).int()}
    inputs = {key: value for key, value in compared.inputs.items() if key in signature(reference.forward).parameters}
    with torch.no_grad():
        expected = reference(input_ids=ids_BT, **inputs, **places, use_cache=False).logits
        actual = model(ids_BT, media=media, positions_BT=positions, prompts_BT=prompts_BT)
    largest = float((actual - expected).abs().max())
    return largest, largest / float(expected.abs().max())
