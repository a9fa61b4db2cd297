"""Open files of videos and sounds with PyAV, and read the frames of a video."""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from litgpt.data.media.errors import MediumError, MissingExtraError
from litgpt.data.media.picture_sizes import Size

VIDEO_FORMATS = ("mov", "matroska", "webm", "avi", "mpegts", "mpeg", "flv", "asf", "ogg", "gif")
"""FFmpeg's names of the formats that are read; others, such as playlists, open files that they name."""
USUAL_FILES = {"video": "an MP4", "sound": "a WAV"}
"""What error messages suggest, by kind."""
MAX_VIDEO_FRAMES = 1_000_000  # 9 hours at 30 a second


def import_av(kind: str) -> Any:
    """PyAV.

    Raises:
        MissingExtraError: if it is not installed.
    """
    try:
        import av
    except ImportError:
        raise MissingExtraError(f"{kind}: PyAV is not installed: pip install 'litgpt[media]'") from None
    return av


@contextmanager
def open_container(source: Path | bytes, kind: str, formats: Sequence[str]) -> Iterator[Any]:
    """Open a file of some formats, which reads no other file and no address.

    Args:
        kind: of its media, for errors.

    Raises:
        MissingExtraError: if PyAV is not installed.
        MediumError: here and in the block, if it is no such file, or cannot be decoded.
    """
    av = import_av(kind)
    name = str(source) if isinstance(source, Path) else kind
    options = {"format_whitelist": ",".join(formats), "protocol_whitelist": "file"}
    file = f"file:{source}" if isinstance(source, Path) else BytesIO(source)
    try:
        if isinstance(source, Path) and not source.is_file():  # a pipe would wait for a writer
            raise MediumError(name, f"{kind} not found", "no such file", "correct the path")
        with av.open(file, options=options) as container:
            yield container
    except (av.FFmpegError, OSError, ValueError, EOFError, IndexError) as error:
        detail = str(getattr(error, "strerror", None) or error or type(error).__name__)
        cure = f"use e.g. {USUAL_FILES[kind]} file"
        raise MediumError(name, f"not a {kind} that can be read", detail, cure) from None


@dataclass(frozen=True)
class VideoHeader:
    """What is known of a video without decoding it, except its first frame, which says how it is turned.

    Attributes:
        frames: their number.
        rate: frames a second.
        size: of a frame as it is shown, height and width.
        times: when each frame is shown, ascending, in the units of the file; empty if it does not say so.
        keys: the same for those that are decoded without others.
        jumps: the times by which the file is searched for each of `keys`: when it is decoded, in some formats.
    """

    frames: int
    rate: float
    size: Size
    times: Sequence[int]
    keys: Sequence[int]
    jumps: Sequence[int] = ()


def read_video_header(source: Path | bytes) -> VideoHeader:
    """The number, rate and size of the frames of a video, from its packets.

    Raises:
        MissingExtraError: if PyAV is not installed.
        MediumError: if it is not a video of these formats, has no frames or rate, or too many frames or pixels.
    """
    av = import_av("video")
    with open_container(source, "video", VIDEO_FORMATS) as container:
        stream = get_video_stream(container, source)
        rate = stream.average_rate or stream.guessed_rate
        # not the packets themselves, which have the file's bytes
        by_pts = bool(container.format.flags & av.format.Flags.seek_to_pts.value)
        packets = [
            (packet.pts, packet.pts if by_pts else packet.dts, packet.is_keyframe, packet.is_discard)
            for packet in islice(container.demux(stream), MAX_VIDEO_FRAMES + 1)
            if packet.size
        ]
        listed, frames = stream.frames, [frame for *frame, is_hidden in packets if not is_hidden]
    if len(packets) < listed <= MAX_VIDEO_FRAMES:
        detail = f"it has {len(packets):,} of {listed:,} frames"
        raise describe_fault(source, "not a video that can be read", detail, "restore the file")
    if not frames or not rate:
        raise describe_fault(source, "not a video that can be read", "no frames or no rate", "use e.g. an MP4 file")
    if len(packets) > MAX_VIDEO_FRAMES:
        limit = f"more than {MAX_VIDEO_FRAMES:,} frames"
        raise describe_fault(source, "video with too many frames", limit, "cut it into parts")
    times = sorted({time for time, *_ in frames if time is not None})
    times = times if len(times) == len(frames) else []
    keys = sorted((time, time if jump is None else jump) for time, jump, is_key in frames if is_key) if times else []
    size = read_first_frame(source).shape[1:]
    starts, jumps = ([key[part] for key in keys] for part in (0, 1))
    return VideoHeader(len(frames), float(rate), (size[0], size[1]), times, starts, jumps)


def read_first_frame(source: Path | bytes) -> Tensor:
    """The first frame of a video, uint8 (3, H, W), turned as it is shown.

    Raises:
        MissingExtraError: if PyAV is not installed.
        MediumError: if it cannot be decoded.
    """
    with open_container(source, "video", VIDEO_FORMATS) as container:
        frame = next(container.decode(get_video_stream(container, source)), None)
        if frame is None:
            raise describe_fault(source, "not a video that can be read", "no frame is decoded", "restore the file")
        return convert_frame(frame)


def describe_fault(source: Path | bytes, reason: str, detail: str, cure: str) -> MediumError:
    """The error of a video."""
    return MediumError(str(source) if isinstance(source, Path) else "video", reason, detail, cure)


def get_video_stream(container: Any, source: Path | bytes) -> Any:
    """The first video of a file, whose frames are not larger than the largest image that is decoded.

    Raises:
        MediumError: if it has none, no decoder is known for it, or they are.
    """
    from PIL import Image

    if not container.streams.video:
        raise describe_fault(source, "not a video that can be read", "no pictures in it", "use e.g. an MP4 file")
    stream, limit = container.streams.video[0], Image.MAX_IMAGE_PIXELS
    if stream.codec_context is None:
        raise describe_fault(source, "not a video that can be read", "no decoder for it", "use e.g. an MP4 file")
    if limit is not None:
        if stream.height * stream.width > limit:
            detail = f"{stream.width} x {stream.height} pixels"
            raise describe_fault(source, "video with too many pixels", detail, f"use one of at most {limit:,}")
        stream.codec_context.options = {"max_pixels": str(limit)}  # of frames that are larger than the header says
    return stream


def read_frames(
    source: Path | bytes, header: VideoHeader, indices: Sequence[int], *, max_pixels: int | None = None
) -> Iterator[Tensor]:
    """Decode some frames of a video, uint8 (3, H, W) each, turned as they are shown.

    Args:
        indices: the numbers of the frames, ascending, without any twice.
        max_pixels: the pixels of all frames that are decoded, each of its own size; None for any number.

    Raises:
        MediumError: if it cannot be decoded, has more pixels, or ends before the last of them.
    """
    missing, pixels = list(indices), 0
    with open_container(source, "video", VIDEO_FORMATS) as container:
        stream = get_video_stream(container, source)
        for frame, is_read in find_frames(container, stream, header, indices):
            pixels += frame.width * frame.height
            if max_pixels is not None and pixels > max_pixels:
                detail = f"more than {max_pixels:,} in its frames, which grow"
                raise describe_fault(source, "video with too many pixels", detail, "use a shorter or smaller one")
            if is_read:
                yield convert_frame(frame)
                del missing[0]
        if missing:
            detail = f"it ends before frame {missing[0] + 1} of {header.frames}"
            raise describe_fault(source, "not a video that can be read", detail, "restore the file")


def find_frames(container: Any, stream: Any, header: VideoHeader, indices: Sequence[int]) -> Iterator[tuple[Any, bool]]:
    """Decode up to each frame, from the key frame before it if the file says when frames are shown.

    Yields all that are decoded, and whether each is one of those.
    """
    decoded, number, last = container.decode(stream), -1, -1
    for index in indices:
        if header.times:
            key = bisect_right(header.keys, header.times[index]) - 1
            start = bisect_right(header.times, header.keys[key]) - 1 if key >= 0 else 0
            if start > last + 1:
                container.seek(header.jumps[key], stream=stream)
                decoded = container.decode(stream)
        for frame in decoded:
            number += 1
            is_read = frame.pts >= header.times[index] if header.times else number == index
            yield frame, is_read
            if is_read:
                last = index
                break
        else:
            return


def convert_frame(frame: Any) -> Tensor:
    """The pixels of a frame, uint8 (3, H, W), turned as it is shown."""
    pixels = torch.from_numpy(frame.to_ndarray(format="rgb24"))
    turns = round(frame.rotation / 90) % 4
    return pixels.rot90(turns).permute(2, 0, 1).contiguous()
