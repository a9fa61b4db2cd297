"""Videos: frames, sizes, pixels and times equal the processors of transformers; files that are none are one line."""

import json
import sys
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.video_utils import read_video_pyav

from litgpt.data.media import containers
from litgpt.data.media.containers import VideoHeader, read_frames, read_video_header
from litgpt.data.media.errors import MissingExtraError
from litgpt.data.media.patches import cut_patches
from litgpt.data.media.reader import MediaReader
from litgpt.data.media.videos import FRAME_RULES, VideoPlan, plan_video, read_video_settings
from litgpt.data.read.media import Medium
from litgpt.errors import UserError
from litgpt.model.tower_config import TowerShape
from tests.data.media.test_pictures import PATCHES
from tests.video_files import write_video

SHAPE = TowerShape.from_values({**PATCHES, "image_token": 1, "video_token": 2})
LARGE = {"size": {"shortest_edge": 4 * 784, "longest_edge": 40 * 784}}
SMALL = {"size": {"shortest_edge": 4 * 784, "longest_edge": 20 * 784}, "cap_pixels_per_frame": True}
PROCESSORS: list[tuple[str, dict[str, Any]]] = [
    ("Qwen2VLVideoProcessor", {**LARGE, "fps": 2.0}),
    ("Qwen2VLVideoProcessor", {**SMALL, "fps": 5.0, "max_frames": 6, "max_video_tokens": 50}),
    ("Qwen2VLVideoProcessor", {**LARGE, "num_frames": 5}),
    ("Qwen3VLVideoProcessor", {**LARGE, "fps": 2.0, "patch_size": 14}),
    ("Qwen3VLVideoProcessor", {**SMALL, "fps": 3.0, "patch_size": 14, "min_frames": 3, "max_video_tokens": 5}),
]
AS_IMAGES = ("InternVLVideoProcessor", "LlavaOnevisionVideoProcessor")
FILES: dict[str, dict[str, Any]] = {
    "a.mp4": {"frames": 40, "size": (48, 64), "rate": 8},  # with frames that are decoded in another order
    "b.avi": {"frames": 21, "size": (96, 40), "rate": 10, "codec": "mpeg4"},
    "c.mkv": {"frames": 7, "size": (30, 200), "rate": 3},
    "d.mov": {"frames": 90, "size": (120, 90), "rate": 30, "codec": "mpeg4", "keys": 5},
    "e.webm": {"frames": 25, "size": (64, 64), "rate": 5, "codec": "libvpx-vp9"},
    "f.ts": {"frames": 60, "size": (48, 64), "rate": 25, "keys": 12},
}
COUNTED = ("a.mp4", "b.avi", "d.mov")
"""Files whose header has the number of frames, which transformers needs."""


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    for name, settings in FILES.items():
        write_video(folder / name, **settings)
    return folder


def build_reader(folder: Path, kind: str, settings: dict[str, Any]) -> MediaReader:
    values = {"video_processor_type": kind, **settings}
    (folder / "video_preprocessor_config.json").write_text(json.dumps(values))
    return MediaReader(None, SHAPE, True, read_video_settings(folder, ""))  # type: ignore[arg-type]  # of no image


@pytest.mark.parametrize("number", range(len(PROCESSORS)))
def test_patches_are_those_of_transformers(number: int, videos: Path, tmp_path: Path) -> None:
    kind, settings = PROCESSORS[number]
    processor, reader = getattr(transformers, kind)(**settings), build_reader(tmp_path, kind, settings)
    sampling = {key: settings.get(key) for key in ("fps", "num_frames")}
    for name in FILES:
        path = videos / name
        header = read_video_header(path)
        plan = plan_video(header, reader.videos, SHAPE)  # type: ignore[arg-type]
        if name in COUNTED:
            frames, metadata = read_video_pyav(str(path), partial(processor.sample_frames, **sampling))
        else:
            metadata = transformers.video_utils.VideoMetadata(total_num_frames=header.frames, fps=header.rate)
            metadata.frames_indices = processor.sample_frames(metadata, **sampling)
            frames = torch.stack(list(read_frames(path, header, range(header.frames))))[metadata.frames_indices]
        assert list(plan.frames) == metadata.frames_indices.tolist()
        expected = processor([frames], do_sample_frames=False, video_metadata=[metadata], return_tensors="pt")
        medium = Medium(path=str(path), kind="video")
        grids = reader.list_grids(reader.plan(medium))
        assert [list(grid) for grid in grids] == expected["video_grid_thw"].tolist()
        assert torch.equal(reader.read(medium, grids), expected["pixel_values_videos"])
        assert plan.seconds == pytest.approx(SHAPE.temporal / metadata.sampled_fps, rel=1e-12)
        times = transformers.Qwen3VLProcessor._calculate_timestamps(None, metadata.frames_indices, header.rate, 2)
        assert list(plan.times) == pytest.approx(times, rel=1e-12)


SIDES, SQUARES = (
    {"size": {"height": 28, "width": 56}},
    {"size": {"longest_edge": 50}, "max_image_size": {"longest_edge": 28}},
)


@pytest.mark.parametrize(
    ("kind", "settings", "columns"),
    [
        *[(kind, {**SIDES, **number}, 4) for kind in AS_IMAGES for number in ({"fps": 2.0}, {"num_frames": 3})],
        ("SmolVLMVideoProcessor", {**SQUARES, "fps": 2.0, "num_frames": 5}, 2),
    ],
)
def test_frames_as_images_are_those_of_transformers(
    kind: str, settings: dict[str, Any], columns: int, videos: Path, tmp_path: Path
) -> None:
    processor = getattr(transformers, kind)(**settings)
    shape = TowerShape.from_values({**PATCHES, "temporal": 1, "image_token": 1})
    values = build_reader(tmp_path, kind, settings).videos
    reader = MediaReader(None, shape, False, values)  # type: ignore[arg-type]  # of no image
    sampling = {key: settings.get(key) for key in ("fps", "num_frames")}
    for name in COUNTED:
        frames, metadata = read_video_pyav(str(videos / name), partial(processor.sample_frames, **sampling))
        (pixels, *_) = processor([frames], do_sample_frames=False, return_tensors="pt").values()
        (expected,) = pixels
        medium = Medium(path=str(videos / name), kind="video")
        plan = reader.plan(medium)
        assert isinstance(plan, VideoPlan) and list(plan.frames) == metadata.frames_indices.tolist()
        grids = reader.list_grids(plan)
        assert grids == ((len(expected), 2, columns),)
        assert torch.equal(reader.read(medium, grids), cut_patches(expected, shape)[0])


@pytest.mark.parametrize("kind", ["Qwen2VLVideoProcessor", "Qwen3VLVideoProcessor", *AS_IMAGES])
def test_frames_of_many_lengths_and_rates(kind: str, tmp_path: Path) -> None:
    processor, reader = getattr(transformers, kind)(fps=2.0), build_reader(tmp_path, kind, {"fps": 2.0})
    for total in (2, 3, 4, 5, 7, 24, 97, 100, 1000, 12_345, 90_000):
        for rate in (1.0, 5.0, 23.976, 25.0, 30000 / 1001, 60.0):
            metadata = transformers.video_utils.VideoMetadata(total_num_frames=total, fps=rate)
            most = min(total, reader.videos.max_frames)  # type: ignore[union-attr]
            if kind in AS_IMAGES and not 1 <= total / rate * 2 <= most:
                continue  # transformers has no limits there
            expected = processor.sample_frames(metadata, fps=2.0).tolist()
            frames = FRAME_RULES[reader.videos.rule](total, rate, reader.videos, 2)  # type: ignore[union-attr]
            assert frames == expected[: len(frames)] and 0 <= len(expected) - len(frames) <= 1
            if len(expected) > len(frames):  # rounding has given one more, after the last
                assert expected[-1] == total
    (only,) = [FRAME_RULES[reader.videos.rule](1, 25.0, reader.videos, 2)]  # type: ignore[union-attr]
    assert only == [0]


def test_frames_of_long_videos_without_their_ends(tmp_path: Path) -> None:
    processor, values = transformers.SmolVLMVideoProcessor(), {"video_sampling": {"fps": 1, "max_frames": 64}}
    settings = build_reader(tmp_path, "SmolVLMVideoProcessor", values).videos
    assert settings is not None
    for total in (1, 2, 7, 24, 97, 1000, 1980, 90_000):
        for rate in (1.0, 5.0, 23.976, 30000 / 1001, 60.0):
            metadata = transformers.video_utils.VideoMetadata(total_num_frames=total, fps=rate, duration=total / rate)
            expected = processor.sample_frames(metadata, fps=1, num_frames=64).tolist()
            assert FRAME_RULES["long_side"](total, rate, settings, 1) == expected


def test_sampling_of_files_written_for_images(tmp_path: Path) -> None:
    values: dict[str, Any] = {"image_processor_type": "SmolVLMImageProcessor", "max_image_size": {"longest_edge": 28}}
    sampling = {"fps": 2, "max_frames": 9, "video_size": {"longest_edge": 56}}
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps({**values, "fps": 7, "video_sampling": sampling}))
    settings = read_video_settings(tmp_path, "SmolVLMVideoProcessor")
    assert (settings.fps, settings.num_frames, settings.limits, settings.square) == (2, 9, {"longest_edge": 56}, 28)
    path.write_text(json.dumps({**values, "size": {"longest_edge": 84}, "video_sampling": sampling}))
    assert read_video_settings(tmp_path, "SmolVLMVideoProcessor").limits == {"longest_edge": 84}


@pytest.mark.parametrize("name", FILES)
def test_frames_after_a_jump_are_those_of_all(name: str, videos: Path) -> None:
    header = read_video_header(videos / name)
    assert header.frames == FILES[name]["frames"] and header.rate == FILES[name]["rate"]
    everything = list(read_frames(videos / name, header, range(header.frames)))
    assert len(everything) == header.frames and everything[0].shape[1:] == header.size == FILES[name]["size"]
    for indices in ([header.frames - 1], [0, header.frames // 2, header.frames - 2], [3, 4, 6]):
        chosen = list(read_frames(videos / name, header, indices))
        assert all(torch.equal(frame, everything[index]) for frame, index in zip(chosen, indices, strict=True))


def test_a_jump_decodes_from_the_key_frame_before(videos: Path) -> None:
    converted, header = list[int](), read_video_header(videos / "d.mov")
    assert len(header.keys) >= 15
    with containers.open_container(videos / "d.mov", "video", containers.VIDEO_FORMATS) as container:
        stream = containers.get_video_stream(container, videos / "d.mov")
        decode = container.decode
        counted = type("Counted", (), {})()

        def count(*args: Any) -> Any:
            for frame in decode(*args):
                converted.append(frame.pts)
                yield frame

        counted.decode, counted.seek = count, container.seek
        read = [is_read for _, is_read in containers.find_frames(counted, stream, header, [42, 86])]
        assert sum(read) == 2 and len(read) == len(converted)
    assert len(converted) < 20


def test_a_turned_video_is_read_as_it_is_shown(tmp_path: Path) -> None:
    plain, turned = tmp_path / "plain.mp4", tmp_path / "turned.mp4"
    write_video(plain, 4, (48, 64), codec="mpeg4")
    write_video(turned, 4, (48, 64), codec="mpeg4", turn=90)
    header = read_video_header(turned)
    assert header.size == (64, 48)
    (expected,), (frame,) = (list(read_frames(path, read_video_header(path), [2])) for path in (plain, turned))
    assert torch.equal(frame, expected.rot90(1, (1, 2)))


def test_bytes_of_a_file_are_read_as_the_file(videos: Path) -> None:
    data, header = (videos / "a.mp4").read_bytes(), read_video_header(videos / "a.mp4")
    assert read_video_header(data) == header
    from_bytes, from_file = (list(read_frames(source, header, [1, 30])) for source in (data, videos / "a.mp4"))
    assert all(torch.equal(*pair) for pair in zip(from_bytes, from_file, strict=True))


def test_a_truncated_video_has_a_size_and_not_all_frames(videos: Path, tmp_path: Path) -> None:
    reader, data = build_reader(tmp_path, *PROCESSORS[0]), (videos / "e.webm").read_bytes()
    path = tmp_path / "cut.webm"
    path.write_bytes(data[: len(data) // 2])
    medium = Medium(path=str(path), kind="video")
    whole = reader.list_grids(reader.plan(Medium(path=str(videos / "e.webm"), kind="video")))
    with pytest.raises(UserError, match=r"cut\.webm: not of the size that it had when the data was prepared"):
        reader.read(medium, whole)
    with pytest.raises(UserError, match=r"not a video that can be read \(it ends before frame 23 of 25\)"):
        list(read_frames(path, read_video_header(videos / "e.webm"), [0, 22]))
    write_video(tmp_path / "long.mp4", 60, options={"movflags": "faststart"})
    data = (tmp_path / "long.mp4").read_bytes()
    (tmp_path / "long.mp4").write_bytes(data[: int(len(data) * 0.8)])
    with pytest.raises(UserError, match=r"long\.mp4: not a video that can be read \(it has \d\d of 60 frames\)"):
        reader.plan(Medium(path=str(tmp_path / "long.mp4"), kind="video"))


PLAYLIST = b"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\n/etc/passwd\n#EXT-X-ENDLIST\n"
SCRIPT = b"ffconcat version 1.0\nfile '/etc/passwd'\n"


def write_sound() -> bytes:
    """A file with a sound alone."""
    import av

    buffer = BytesIO()
    with av.open(buffer, "w", format="mov") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame(format="s16", layout="mono", samples=800)
        frame.rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return buffer.getvalue()


NO_VIDEOS = [
    b"",
    b"not a video",
    PLAYLIST,
    SCRIPT,
    b"\0\0\0\x18ftypmp42" + bytes(200),
    b"\x89PNG\r\n\x1a\n" + bytes(90),
]


def test_files_that_are_no_video_are_one_line(tmp_path: Path) -> None:
    for data in (*NO_VIDEOS, write_sound()):
        check_no_video(tmp_path / "a.mp4", data)


def check_no_video(path: Path, data: bytes) -> None:
    """Check that a file with these bytes is refused in one line."""
    path.write_bytes(data)
    for source in (path, path.read_bytes()):
        with pytest.raises(UserError, match="not a video that can be read") as error:
            read_video_header(source)
        assert "\n" not in str(error.value)


def test_other_paths_and_limits(videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in (tmp_path / "none.mp4", tmp_path):
        with pytest.raises(UserError, match=r"video not found \(no such file\)"):
            read_video_header(path)
    monkeypatch.setattr(containers, "MAX_VIDEO_FRAMES", 20)
    with pytest.raises(UserError, match=r"b\.avi: video with too many frames \(more than 20 frames\); cut it"):
        read_video_header(videos / "b.avi")
    monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(UserError, match=r"video with too many pixels \(64 x 48 pixels\); use one of at most 1,000"):
        read_video_header(videos / "a.mp4")


def test_frames_that_are_larger_than_the_first_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, parts = tmp_path / "grows.ts", [BytesIO(), BytesIO()]
    for part, size in zip(parts, [(16, 24), (160, 240)], strict=True):
        write_video(part, 8, size, codec="mpeg2video", rate=25, form="mpegts")
    path.write_bytes(b"".join(part.getvalue() for part in parts))
    header = read_video_header(path)
    assert header.frames == 16 and len(list(read_frames(path, header, [2, 12]))) == 2
    monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(UserError, match="not a video that can be read"):
        list(read_frames(path, header, [2, 12]))


def test_without_pyav_one_line_names_the_extra(videos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(MissingExtraError, match=r"^video: PyAV is not installed: pip install 'litgpt\[media\]'$"):
        read_video_header(videos / "a.mp4")


def test_settings_of_older_and_merged_files(tmp_path: Path) -> None:
    older = {"image_processor_type": "Qwen2VLImageProcessor", "min_pixels": 4000, "max_pixels": 9000}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(older))
    settings = read_video_settings(tmp_path, "Qwen2VLVideoProcessor")
    assert settings.limits == {"shortest_edge": 4000, "longest_edge": 9000} and settings.rule == "frame"
    merged = {"video_processor": {"video_processor_type": "Qwen3VLVideoProcessor", "fps": 4}}
    (tmp_path / "processor_config.json").write_text(json.dumps(merged))
    settings = read_video_settings(tmp_path, "Qwen2VLVideoProcessor")
    assert settings.rule == "volume" and settings.fps == 4.0


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"video_processor_type": "LlavaVideoProcessor"}, "video_processor_type: LlavaVideoProcessor is not supported"),
        ({"do_normalize": False}, "do_normalize: false is not supported; use true"),
        ({"size": {"height": 4, "width": 4}}, "size: .* is not supported; set shortest_edge and longest_edge"),
        ({"resample": 0}, "resample: 0 is not supported"),
        ({"resample": [3]}, r"resample: \[3\] is not supported"),
        ({"size": "large"}, "size: large is not supported; set shortest_edge"),
        ({"max_pixels": "9000"}, "size: .*'9000'.* is not supported; set shortest_edge"),
        ({"fps": "2"}, "fps: 2 is not supported; use a number above 0"),
        ({"fps": 0}, "fps: 0 is not supported; use a number above 0"),
        ({"fps": float("nan")}, "fps: nan is not supported"),
        ({"num_frames": "8"}, "num_frames: 8 is not supported; use 1 to 1000000"),
        ({"min_frames": 2.5}, "min_frames: 2.5 is not supported; use 1 to 1000000"),
        ({"max_frames": 0}, "max_frames: 0 is not supported; use 1 to 1000000"),
        ({"cap_pixels_per_frame": "yes"}, "cap_pixels_per_frame: yes is not supported; use true or false"),
        ({"max_video_tokens": "768"}, "max_video_tokens: 768 is not supported; use a whole number"),
        ({"image_mean": 0.5}, "image_mean: 0.5 is not supported; use three numbers"),
        ({"image_std": [1, 0, 1]}, r"image_std: \[1, 0, 1\] is not supported; use three numbers"),
        ({"rescale_factor": "1/255"}, "rescale_factor: 1/255 is not supported; use e.g. 0.0039"),
        ({"video_sampling": 8}, "video_sampling: 8 is not supported; use keys and values"),
        (
            {"video_processor_type": "SmolVLMVideoProcessor", "max_image_size": 364},
            "max_image_size: 364 is not supported; set longest_edge",
        ),
    ],
)
def test_settings_that_are_not_supported(values: dict[str, Any], text: str, tmp_path: Path) -> None:
    (tmp_path / "video_preprocessor_config.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=rf"video_preprocessor_config\.json: {text}"):
        read_video_settings(tmp_path, "Qwen2VLVideoProcessor")
    (tmp_path / "processor_config.json").write_text('{"video_processor": []}')
    with pytest.raises(UserError, match=r"processor_config\.json: video_processor: \[\] is not supported"):
        read_video_settings(tmp_path, "Qwen2VLVideoProcessor")
    with pytest.raises(UserError, match=r"has no video_preprocessor_config\.json"):
        read_video_settings(tmp_path / "none", "Qwen2VLVideoProcessor")


@pytest.mark.parametrize(("size", "frames", "text"), [((10, 3000), 8, "ratio"), ((64, 64), 1, "too short")])
def test_narrow_and_short_videos(size: tuple[int, int], frames: int, text: str, tmp_path: Path) -> None:
    reader = build_reader(tmp_path, "Qwen3VLVideoProcessor", {})
    with pytest.raises(UserError, match=text):
        plan_video(VideoHeader(frames, 8.0, size, (), ()), reader.videos, SHAPE)  # type: ignore[arg-type]
