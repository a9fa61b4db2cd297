"""Choose the frames of videos and their size as the published processor of a model folder does."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from litgpt.data.media.canvases import order_frames
from litgpt.data.media.containers import VideoHeader
from litgpt.data.media.picture_settings import CLIP_COLORS, HALF_COLORS, INTERPOLATIONS, PROCESSOR_FILES
from litgpt.data.media.picture_sizes import (
    LONGEST_SIDE,
    NARROWEST,
    SIZE_KEYS,
    Size,
    check_most,
    fit_area,
    fit_long_side,
    read_sides,
)
from litgpt.data.media.pictures import interpolate
from litgpt.errors import UserError
from litgpt.files import read_json_object
from litgpt.mappings import drop_nulls
from litgpt.model.colors import check_color, check_scale
from litgpt.model.feature_order import FeatureOrder
from litgpt.model.media import Grid
from litgpt.model.tower_config import TowerShape

VIDEO_PROCESSOR_FILE = "video_preprocessor_config.json"
SAMPLED: dict[str, Any] = {
    **{"fps": 2.0, "num_frames": None, "min_frames": 4, "max_frames": 768, "cap_pixels_per_frame": False},
    **{"resample": 3, "rescale_factor": 1 / 255},
}
BY_FRAME = {"size": {"shortest_edge": 128 * 28 * 28, "longest_edge": 768 * 28 * 28}, "max_video_tokens": 128_000}
BY_VOLUME = {"size": {"shortest_edge": 128 * 32 * 32, "longest_edge": 768 * 32 * 32}, "max_video_tokens": 768}
BY_FRAMES = {"fps": 1.0, "min_frames": 1, "max_frames": 32}  # LLaVA-OneVision's, whose processor reads all frames
BY_SIDES = {"size": {"height": 384, "width": 384}, "max_video_tokens": 0}
BY_SQUARES: dict[str, Any] = {"size": {"longest_edge": 1456}, "max_image_size": {"longest_edge": 364}}
BY_SQUARES |= {"max_video_tokens": 0, "resample": 1, "fps": 1.0, "num_frames": 64}
# The rule of each processor for frames and sizes, and the settings that its file may leave out.
VIDEO_PROCESSORS: dict[str, tuple[str, dict[str, Any]]] = {
    "Qwen2VLVideoProcessor": ("frame", {**SAMPLED, **CLIP_COLORS, **BY_FRAME}),
    "Qwen3VLVideoProcessor": ("volume", {**SAMPLED, **HALF_COLORS, **BY_VOLUME}),
    "InternVLVideoProcessor": ("square", {**SAMPLED, **CLIP_COLORS, **BY_SIDES}),
    "LlavaOnevisionVideoProcessor": ("part", {**SAMPLED, **BY_FRAMES, **CLIP_COLORS, **BY_SIDES}),
    "SmolVLMVideoProcessor": ("long_side", {**SAMPLED, **HALF_COLORS, **BY_SQUARES}),
}
REQUIRED_VIDEO_STEPS = ("do_resize", "do_rescale", "do_normalize", "initial_shift")
"""Steps that a processor's file may turn off, or change, which is not supported."""
MOST_FRAMES = 1_000_000  # eleven hours at 24 a second


@dataclass(frozen=True)
class VideoSettings:
    """How the videos of a model are sampled, resized and normalized.

    Attributes:
        rule: how frames and their size are chosen, a key of `FRAME_RULES` and `VIDEO_SIZE_RULES`.
        fps: frames that are read of a second, unless `num_frames` are read of each video.
        min_frames, max_frames: limits of their number.
        limits: by the rule, the least and the most pixels, `shortest_edge` and `longest_edge`, of a frame or of all; or
            the `height` and `width` of a frame; or the `longest_edge` of a frame.
        square: the side of the square to which a frame is resized at last; None if it stays as it is.
        cap_pixels_per_frame: whether a frame has at most the share of `max_video_tokens`, by the rule.
        interpolation, mean, std, scale: as of `PictureSettings`.
    """

    rule: str
    fps: float
    num_frames: int | None
    min_frames: int
    max_frames: int
    limits: Mapping[str, int]
    square: int | None
    cap_pixels_per_frame: bool
    max_video_tokens: int
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    scale: float
    in_bfloat16: ClassVar[bool] = False  # as of `PictureSettings`, for no video


@dataclass(frozen=True)
class VideoPlan:
    """What the tower reads of a video.

    Attributes:
        frames: the numbers of the frames, ascending.
        sizes: to which each is resized, one after the other.
        seconds: from one step of frames to the next.
        times: of each step, in seconds: the mean of its first and its last frame.
        duration: of the whole video, in seconds.
    """

    frames: tuple[int, ...]
    sizes: tuple[Size, ...]
    seconds: float
    times: tuple[float, ...]
    duration: float

    @property
    def size(self) -> Size:
        """Of each frame as the tower reads it."""
        return self.sizes[-1]

    def list_grids(self, side: int) -> tuple[Grid, ...]:
        """The number of steps, and the size of a frame in patches of this side."""
        return ((len(self.times), self.size[0] // side, self.size[1] // side),)

    def build_order(self, shape: TowerShape) -> FeatureOrder:
        """The features of a tower with a line break at its places."""
        return order_frames(len(self.times), self.size[0] // shape.patch, shape.frame_block)


def read_video_settings(folder: Path, processor: str, *, is_shared: bool = True) -> VideoSettings:
    """The settings of the video processor in a model folder.

    Args:
        processor: its class, if the file does not name it, as those written for images alone.
        is_shared: whether settings of images are for videos too, if the folder has none of videos.

    Raises:
        UserError: if the folder has none, or one that is not supported.
    """
    path, values = find_video_values(folder, is_shared=is_shared)
    kind = str(values.get("video_processor_type", processor)).removesuffix("Fast")
    if kind not in VIDEO_PROCESSORS:
        listed = ", ".join(VIDEO_PROCESSORS)
        raise UserError(f"{path}: video_processor_type: {kind} is not supported; use one of {listed}")
    for step in REQUIRED_VIDEO_STEPS:
        if values.get(step, True) not in (True, None):
            raise UserError(f"{path}: {step}: {str(values[step]).lower()} is not supported; use true")
    rule, defaults = VIDEO_PROCESSORS[kind]
    settings = {**defaults, **drop_nulls(values), **read_sampling(path, values)}
    older = {"shortest_edge": values.get("min_pixels"), "longest_edge": values.get("max_pixels")}
    size, resample, tile = settings["size"], settings["resample"], settings.get("max_image_size")
    if isinstance(size, dict):
        size = {**size, **drop_nulls(older)}
    if type(resample) is not int or resample not in INTERPOLATIONS:
        raise UserError(f"{path}: resample: {resample} is not supported; use one of {INTERPOLATIONS}")
    return VideoSettings(
        rule=rule,
        limits=read_sides(path, "size", size, SIZE_KEYS[rule]),
        square=read_sides(path, "max_image_size", tile, ("longest_edge",))["longest_edge"]
        if rule == "long_side"
        else None,
        interpolation=INTERPOLATIONS[resample],
        mean=check_color(path, "image_mean", settings["image_mean"]),
        std=check_color(path, "image_std", settings["image_std"]),
        scale=check_scale(path, settings["rescale_factor"]),
        **check_frame_numbers(path, settings),
    )


def check_frame_numbers(path: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a video processor that frames are chosen by, of `VideoSettings`.

    Raises:
        UserError: if one is not of its type, or out of range.
    """
    fps, cap, tokens = (settings[key] for key in ("fps", "cap_pixels_per_frame", "max_video_tokens"))
    if type(fps) not in (int, float) or not 0 < fps < math.inf:
        raise UserError(f"{path}: fps: {fps} is not supported; use a number above 0, e.g. 2.0")
    if type(cap) is not bool:
        raise UserError(f"{path}: cap_pixels_per_frame: {cap} is not supported; use true or false")
    if type(tokens) is not int or tokens < 0:
        raise UserError(f"{path}: max_video_tokens: {tokens} is not supported; use a whole number, e.g. 768")
    counts = {
        key: None
        if key == "num_frames" and settings[key] is None
        else check_most(path, key, settings[key], MOST_FRAMES)
        for key in ("num_frames", "min_frames", "max_frames")
    }
    return {"fps": float(fps), "cap_pixels_per_frame": cap, "max_video_tokens": tokens, **counts}


def read_sampling(path: Path, values: Mapping[str, Any]) -> dict[str, Any]:
    """The settings in `video_sampling` of a file, which come before those beside it, except for the size (SmolVLM).

    Raises:
        UserError: if they are no settings.
    """
    sampling = values.get("video_sampling") or {}
    if not isinstance(sampling, dict):
        raise UserError(f"{path}: video_sampling: {sampling} is not supported; use keys and values")
    size = values.get("size") or sampling.get("video_size")
    named = {"num_frames": sampling.get("max_frames"), "fps": sampling.get("fps"), "size": size}
    return {name: value for name, value in named.items() if value is not None}


def has_video_settings(folder: Path) -> bool:
    """Whether a model folder has the settings of a video processor, at least those of images."""
    return any((folder / name).is_file() for name in (VIDEO_PROCESSOR_FILE, *PROCESSOR_FILES))


def find_video_values(folder: Path, *, is_shared: bool) -> tuple[Path, dict[str, Any]]:
    """The file with the settings of a video processor, and what it says.

    Args:
        is_shared: whether the settings of images are for videos too, if no file is for videos; else it says nothing.

    Raises:
        UserError: if the folder has none, or its file is damaged.
    """
    merged = folder / "processor_config.json"
    if merged.is_file() and (values := read_json_object(merged)).get("video_processor") is not None:
        if not isinstance(settings := values["video_processor"], dict):
            raise UserError(f"{merged}: video_processor: {settings} is not supported; download the file again")
        return merged, settings
    for name in (VIDEO_PROCESSOR_FILE, *PROCESSOR_FILES):
        if (folder / name).is_file():
            is_read = is_shared or name == VIDEO_PROCESSOR_FILE
            return folder / name, read_json_object(folder / name) if is_read else {}
    raise UserError(f"{folder}: has no {VIDEO_PROCESSOR_FILE}; use the folder of a model that reads videos")


def sample_even(total: int, rate: float, settings: VideoSettings, temporal: int) -> list[int]:
    """Frames at equal distances from the first, as many as fill patches of `temporal` frames (Qwen2-VL)."""
    most = min(settings.max_frames, total) // temporal * temporal
    if settings.num_frames is None:
        count = min(max(total / rate * settings.fps, settings.min_frames), most)
    else:
        count = min(round(settings.num_frames / temporal) * temporal, most)
    count = max(math.floor(count / temporal) * temporal, 1)  # one of a video that has no more
    return torch.arange(0, total, total / count).int()[:count].tolist()


def sample_span(total: int, rate: float, settings: VideoSettings, _temporal: int) -> list[int]:
    """Frames at equal distances from the first to the last (Qwen3-VL)."""
    count = settings.num_frames
    if count is None:
        count = max(int(total / rate * settings.fps), settings.min_frames)
    count = min(count, settings.max_frames, total)
    return np.linspace(0, total - 1, count).round().astype(int).tolist()


def sample_middles(total: int, rate: float, settings: VideoSettings, _temporal: int) -> list[int]:
    """The middles of parts of equal length (InternVL)."""
    count = int(total / rate * settings.fps) if settings.num_frames is None else settings.num_frames
    length = total / max(min(count, settings.max_frames, total), 1)
    return torch.arange(length / 2, total, length).int().tolist()


def sample_starts(total: int, rate: float, settings: VideoSettings, _temporal: int) -> list[int]:
    """The first frames of parts of equal length (LLaVA-OneVision)."""
    count = int(total / rate * settings.fps) if settings.num_frames is None else settings.num_frames
    count = min(max(count, settings.min_frames), settings.max_frames, total)
    return [number * total // count for number in range(count)]


def sample_inner(total: int, rate: float, settings: VideoSettings, _temporal: int) -> list[int]:
    """Frames at equal distances, of a long video without its first and last second (SmolVLM)."""
    seconds, most = total / rate, settings.num_frames or total
    count = max(min(round(settings.fps * seconds), most), 1)
    first, last = 0, total - 1
    if seconds - 2 > most * settings.fps:
        inner = int(rate), min(int(total - rate), last)
        first, last = inner if inner[0] < inner[1] else (first, last)
    return np.unique(np.linspace(first, last, count, dtype=int)).tolist()


def fit_frame(size: Size, frames: int, settings: VideoSettings, shape: TowerShape) -> Size:
    """The area of each frame within its limits, as of an image (Qwen2-VL).

    Raises:
        UserError: if the video is too narrow.
    """
    unit, limits = shape.patch * shape.merge, dict(settings.limits)
    if settings.cap_pixels_per_frame:
        share = int(settings.max_video_tokens * unit * unit * 0.9) * shape.temporal // frames
        limits["longest_edge"] = max(min(limits["longest_edge"], share), int(limits["shortest_edge"] * 1.05))
    return fit_area(size, limits, unit)


def fit_volume(size: Size, frames: int, settings: VideoSettings, shape: TowerShape) -> Size:
    """Both sides at multiples of a merge block, the pixels of all frames within their limits (Qwen3-VL).

    Raises:
        UserError: if the video is too narrow, or has fewer frames than a patch.
    """
    unit, least, most = shape.patch * shape.merge, settings.limits["shortest_edge"], settings.limits["longest_edge"]
    if settings.cap_pixels_per_frame:
        share = min(settings.max_video_tokens * unit * unit, most // frames)
        most = max(share, int(least * 1.05)) * frames
    if frames < shape.temporal:
        raise UserError(f"video of {frames} frames: too short; use one of {shape.temporal} or more")
    height, width = size
    if min(size) < unit:
        growth = max(unit / height, unit / width)
        height, width = int(height * growth), int(width * growth)
    if max(height, width) > NARROWEST * min(height, width):
        raise UserError(f"video of {size[0]} x {size[1]} pixels: the ratio of its sides is at most {NARROWEST}")
    rounded = round(height / unit) * unit, round(width / unit) * unit
    volume = round(frames / shape.temporal) * shape.temporal * rounded[0] * rounded[1]
    if volume > most:
        shrink = math.sqrt(frames * height * width / most)
        return max(unit, math.floor(height / shrink / unit) * unit), max(unit, math.floor(width / shrink / unit) * unit)
    if volume < least:
        growth = math.sqrt(least / (frames * height * width))
        return math.ceil(height * growth / unit) * unit, math.ceil(width * growth / unit) * unit
    return rounded


def fit_longest(size: Size, _frames: int, settings: VideoSettings, shape: TowerShape) -> Size:
    """The long side at `longest_edge`, as of an image (SmolVLM)."""
    longest = min(settings.limits["longest_edge"], LONGEST_SIDE)
    return fit_long_side(size, {"longest_edge": longest}, shape.patch)


def fit_sides(_size: Size, _frames: int, settings: VideoSettings, _shape: TowerShape) -> Size:
    """The given height and width (InternVL, LLaVA-OneVision)."""
    return settings.limits["height"], settings.limits["width"]


FRAME_RULES: dict[str, Callable[[int, float, VideoSettings, int], list[int]]] = {
    "frame": sample_even,
    "volume": sample_span,
    "square": sample_middles,
    "part": sample_starts,
    "long_side": sample_inner,
}
VIDEO_SIZE_RULES: dict[str, Callable[[Size, int, VideoSettings, TowerShape], Size]] = {
    "frame": fit_frame,
    "volume": fit_volume,
    "square": fit_sides,
    "part": fit_sides,
    "long_side": fit_longest,
}


def plan_video(header: VideoHeader, settings: VideoSettings, shape: TowerShape) -> VideoPlan:
    """The frames of a video that the tower reads, and their size.

    Raises:
        UserError: if it is too narrow or too short.
    """
    frames = FRAME_RULES[settings.rule](header.frames, header.rate, settings, shape.temporal)
    size = VIDEO_SIZE_RULES[settings.rule](header.size, len(frames), settings, shape)
    seconds = shape.temporal / settings.fps
    if shape.step_seconds == "frames":
        seconds = shape.temporal * header.frames / (len(frames) * header.rate)
    sizes = (size,) if settings.square is None else (size, (settings.square, settings.square))
    times, duration = list_times(frames, header.rate, shape.temporal), header.frames / header.rate
    return VideoPlan(tuple(frames), sizes, seconds, times, duration)


def resize_frame(frame_CHW: Tensor, plan: VideoPlan, settings: VideoSettings) -> Tensor:
    """A frame, uint8 (C, H, W), of the size that the tower reads."""
    for size in plan.sizes:
        frame_CHW = interpolate(frame_CHW, size, settings.interpolation)
    return frame_CHW


def list_times(frames: Sequence[int], rate: float, temporal: int) -> tuple[float, ...]:
    """The seconds of each step of frames, of which the last may be filled by its last frame."""
    steps = [frames[start : start + temporal] for start in range(0, len(frames), temporal)]
    return tuple((step[0] / rate + step[-1] / rate) / 2 for step in steps)
