"""Conversations with videos: places, times, positions, faults and batches, and prompts with the same tokens."""

import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from transformers.models.smolvlm import processing_smolvlm
from transformers.video_utils import VideoMetadata, read_video_pyav

from litgpt.api import LLM
from litgpt.data import Conversations
from litgpt.data.media.patches import cut_patches
from litgpt.data.media.positions import build_media_positions
from litgpt.data.render.number_words import spell_number
from litgpt.errors import UserError
from litgpt.model.tower_config import TowerShape
from litgpt.recipe.data import BatchShape
from tests.data.modules.test_images import open_data, read_batches
from tests.parity.test_vision_training import build_processor
from tests.video_files import write_video
from tests.vision_model import draw_image, write_rows, write_vision_model

SQUARES = {
    "width": 8,
    "layers": 1,
    "heads": 2,
    "mlp_size": 8,
    "blocks_run": 1,
    "patch": 4,
    "merge": 2,
    "image_token": 1,
}
THREE = {"micro_batch_size": 3, "global_batch_size": 3}
SHAPE = BatchShape(micro_batch_size=1, global_batch_size=1, max_seq_length=256, rank=0, ranks=1, seed=0)
ANSWER = {"role": "assistant", "content": "left"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models that read videos, two videos and an image."""
    root = tmp_path_factory.mktemp("moving")
    for kind in ("qwen2_vl", "qwen3_vl", "internvl", "llava_onevision", "smolvlm", "llava"):
        write_vision_model(root / kind, kind)
    write_video(root / "a.mp4", 8, (16, 24), rate=4)
    write_video(root / "b.mp4", 6, (32, 16), rate=4, seed=1)
    draw_image(root / "c.png", (200, 30, 40), (24, 16))
    return root


def ask(*content: Any, **columns: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(content)}, ANSWER], **columns}


VIDEO = {"type": "video", "video": "a.mp4"}
WHERE = {"type": "text", "text": "Where?"}


def read_first(folder: Path, kind: str, row: dict[str, Any], cache: Path, **settings: Any) -> tuple[Any, Conversations]:
    """The first batch of one row, and its data."""
    rows = write_rows(cache, [row])
    data = open_data(folder / kind, cache, sources=str(rows), media_dir=folder, **settings)
    (batch,) = read_batches(data, 1, micro_batch_size=1)
    return batch, data


def test_frames_as_images(folder: Path, tmp_path: Path) -> None:
    content = [{"type": "image", "path": "c.png"}, VIDEO, WHERE]
    batch, data = read_first(folder, "internvl", ask(*content), tmp_path)
    text, frame = data.tokenizer.processor.decode(batch.ids[0].tolist(), skip_special_tokens=False), "<image>" * 4
    frames = "\n".join(f"Frame{number}: <img>{frame}</img>" for number in (1, 2, 3, 4))
    assert f"</img>{frames}Where?" in text
    assert batch.media.grids[-1] == (4, 4, 4) and batch.positions is None


def test_interpolated_frames_beside_the_only_image(folder: Path, tmp_path: Path) -> None:
    content = [{"type": "image", "path": "c.png"}, VIDEO, WHERE]
    batch, data = read_first(folder, "llava_onevision", ask(*content), tmp_path)
    image, video = (data.tokenizer.find_token(f"<{kind}>") for kind in ("image", "video"))
    assert batch.media.grids == ((1, 4, 4),) * 3 + ((4, 4, 4),)  # the image in two tiles, and four frames
    # the tiles have 4 rows of 6 features between margins, and a frame 2 x 2 features
    assert batch.media.order.counts == (16 + 4 * (6 + 1), 0, 0, 4 * 2 * 2 + 1)
    assert [int((batch.ids == token).sum()) for token in (image, video)] == [44, 17]
    with torch.no_grad():
        features = LLM.load(folder / "llava_onevision", distribute=None).model.encode_media(batch.media)
    assert len(features) == 44 + 17 and torch.equal(features[43], features[60])  # both end with the learned one


# four of eight frames, of 16 x 24 pixels, are two steps of 4 x 6 patches
@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("qwen2_vl", f"<start>{'<video>' * 12}<end>Where?"),
        (
            "qwen3_vl",
            f"<0.2 seconds><start>{'<video>' * 6}<end><1.5 seconds><start>{'<video>' * 6}<end>Where?",
        ),
    ],
)
def test_places_are_written_out_and_not_trained(kind: str, text: str, folder: Path, tmp_path: Path) -> None:
    batch, data = read_first(folder, kind, ask(VIDEO, WHERE), tmp_path, train_on="everything")
    assert text in data.tokenizer.processor.decode(batch.ids[0].tolist(), skip_special_tokens=False)
    assert batch.media.grids == ((2, 4, 6),) and batch.media.patches_NP.shape == (48, 2 * 3 * 16)
    video = data.tokenizer.find_token("<video>")
    assert not (batch.labels == video).any()
    trained = data.tokenizer.decode(batch.labels[batch.labels >= 0])
    assert "Where?" in trained and "left" in trained and "seconds" not in trained


def test_texts_of_frames_are_those_of_transformers(folder: Path, tmp_path: Path) -> None:
    batch, data = read_first(folder, "qwen3_vl", ask(VIDEO), tmp_path)
    their = transformers.Qwen3VLProcessor
    processor = SimpleNamespace(
        video_processor=SimpleNamespace(merge_size=2, temporal_patch_size=2),
        video_token="<video>",
        vision_start_token="<start>",
        vision_end_token="<end>",
        _calculate_timestamps=partial(their._calculate_timestamps, None),
    )
    metadata = VideoMetadata(total_num_frames=8, fps=4.0, frames_indices=[0, 2, 5, 7])
    inputs = {"video_grid_thw": torch.tensor(batch.media.grids), "video_metadata": [metadata]}
    expected = their.replace_video_token(processor, inputs, 0)
    assert expected in data.tokenizer.processor.decode(batch.ids[0].tolist(), skip_special_tokens=False)


def test_rows_of_smolvlm_are_those_of_transformers(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processing_smolvlm, "num2words", spell_number)  # a package
    batch, _ = read_first(folder, "smolvlm", ask(WHERE, VIDEO, WHERE), tmp_path)
    processor, sampling = build_processor(folder / "smolvlm", "smolvlm"), {"fps": 1.0, "num_frames": 64}
    sample = partial(processor.video_processor.sample_frames, **sampling)
    frames, metadata = read_video_pyav(str(folder / "a.mp4"), sample)
    content = [WHERE, {"type": "video"}, WHERE]
    answer = {"role": "assistant", "content": [{"type": "text", "text": "left"}]}
    text = processor.apply_chat_template([{"role": "user", "content": content}, answer])
    settings = {"video_metadata": [metadata], "do_sample_frames": False, "add_special_tokens": False}
    inputs = processor(text=[text], videos=[frames], return_tensors="pt", **settings)
    assert inputs["input_ids"].tolist() == batch.ids.tolist()
    assert batch.media.grids == ((2, 4, 4),)
    expected = cut_patches(inputs["pixel_values"].flatten(0, 1), TowerShape.from_values(SQUARES))[0]
    assert torch.equal(batch.media.patches_NP, expected)
    llm = LLM.load(folder / "smolvlm", distribute=None)
    question = {"role": "user", "content": "Where?<video>Where?"}
    prompt = llm.prompt_encoder().encode_messages([question], sources={"video": ["a.mp4"]}, folder=folder)
    assert list(prompt.ids) == batch.ids[0, : len(prompt.ids)].tolist()
    assert isinstance(llm.generate("Where?", videos=[folder / "a.mp4"], max_new_tokens=2), str)


@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen3_vl"])
def test_forms_of_a_row_are_one(kind: str, folder: Path, tmp_path: Path) -> None:
    forms = [
        ask({"type": "image", "path": "c.png"}, WHERE, VIDEO),
        ask({"type": "image"}, WHERE, {"type": "video_url", "video_url": {"url": "a.mp4"}}, images=["c.png"]),
        {
            "messages": [{"role": "user", "content": "<image>Where?<video>"}, ANSWER],
            "images": "c.png",
            "videos": ["a.mp4"],
        },
    ]
    batches = []
    for number, row in enumerate(forms):
        (tmp_path / str(number)).mkdir()
        batches.append(read_first(folder, kind, row, tmp_path / str(number))[0])
    assert all(torch.equal(batch.ids, batches[0].ids) for batch in batches)
    assert all(torch.equal(batch.media.patches_NP, batches[0].media.patches_NP) for batch in batches)
    assert batches[0].media.grids == ((1, 4, 6), (2, 4, 6))
    message, sources = {"role": "user", "content": "<image>Where?<video>"}, {"image": ["c.png"], "video": ["a.mp4"]}
    prompt = (
        LLM.load(folder / kind, distribute=None)
        .prompt_encoder()
        .encode_messages([message], sources=sources, folder=folder)
    )
    ids = batches[0].ids[0].tolist()
    assert list(prompt.ids) == ids[: len(prompt.ids)] and len(prompt.ids) < len(ids)
    images = prompt.load_images()
    assert images is not None and images.positions is not None
    assert torch.equal(images.positions, batches[0].positions[0, :, : len(prompt.ids)])
    patches = torch.cat([image.media.patches_NP for image in images.images])
    assert torch.equal(patches, batches[0].media.patches_NP)


def test_positions_have_the_seconds_of_frames(folder: Path, tmp_path: Path) -> None:
    batch, data = read_first(folder, "qwen2_vl", ask(VIDEO, WHERE), tmp_path)
    shape = data.build_media_loader().reader.shape  # type: ignore[union-attr]
    ids, grids = batch.ids[0].tolist(), batch.media.grids
    assert torch.equal(batch.positions[0], build_media_positions(shape, ids, grids))
    timed = shape.from_values({**shape.to_dict(), "tokens_per_second": 5.0})
    loader = data.build_media_loader()
    assert loader is not None
    object.__setattr__(loader.reader, "shape", timed)
    example = data.train_stream(SHAPE).samples._read_row(0)
    (built,) = loader.build_positions([example], {"ids": batch.ids.numpy()}, padding=False).values()
    expected = build_media_positions(timed, ids, grids, seconds=[1.0])
    assert example[0].media[0].seconds == 1.0 and torch.equal(torch.from_numpy(built)[0], expected)


@pytest.mark.parametrize("settings", [{"padding": True}, {"tokenize": "lazy"}])
def test_batches_do_not_depend_on_how_they_are_read(settings: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    rows = [
        ask(VIDEO, WHERE),
        ask(WHERE),
        {
            "messages": [{"role": "user", "content": "<video><image><video>?"}, ANSWER],
            "image": "c.png",
            "videos": ["b.mp4", "a.mp4"],
        },
    ]
    write_rows(tmp_path, rows)
    plain, other = (
        read_batches(open_data(folder / "qwen2_vl", tmp_path, media_dir=folder, **options), 1, **THREE)[0]
        for options in ({}, settings)
    )
    assert other.media.grids == plain.media.grids and len(plain.media.grids) == 4
    assert torch.equal(other.media.patches_NP, plain.media.patches_NP)


def write_bad_rows(folder: Path) -> list[str]:
    """Rows with videos that are bad in many ways among two good ones; returns the reasons."""
    write_video(folder / "a.mp4", 8, (16, 24), rate=4)
    write_video(folder / "cut.mov", 60, (16, 24), rate=4, codec="mpeg4")
    data = (folder / "a.mp4").read_bytes()
    (folder / "text.mp4").write_text("no video")
    (folder / "half.mp4").write_bytes(data[: len(data) // 2])
    write_video(folder / "narrow.mp4", 4, (4, 1000))
    sources: dict[str, Any] = {
        "text.mp4": "not a video that can be read",
        "half.mp4": "not a video that can be read",
        "none.mp4": "video not found",
        "../a.mp4": "video outside of the folder of the data",
        "https://example.com/a.mp4": "video at a URL is not supported",
        "narrow.mp4": "video of a size that the model does not read",
    }
    rows = [ask({"type": "video", "video": source}, WHERE) for source in sources]
    rows += [ask(WHERE, videos=["a.mp4"]), ask(VIDEO, WHERE)]
    rows += [{"messages": [{"role": "user", "content": "<video><video>"}, ANSWER], "videos": ["a.mp4"]}]
    write_rows(folder, rows)
    return [*sources.values(), "more places for videos than videos"]


def test_bad_videos_are_left_out_and_counted(folder: Path, tmp_path: Path) -> None:
    reasons = write_bad_rows(tmp_path)
    data = open_data(folder / "qwen2_vl", tmp_path, on_error="drop")
    (_, file), *_ = data.prepared
    assert file.report.rows == len(reasons) + 2 and file.count == 2  # type: ignore[union-attr]
    assert dict(file.report.reasons) == {reason: reasons.count(reason) for reason in reasons}  # type: ignore[union-attr]


def test_a_video_that_changes_leaves_its_sample_untrained(folder: Path, tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", 8, (16, 24), rate=4)
    write_rows(tmp_path, [ask(VIDEO, WHERE)])
    data = open_data(folder / "qwen2_vl", tmp_path, on_error="drop")
    write_video(tmp_path / "a.mp4", 8, (32, 24), rate=4)
    (batch,) = read_batches(data, 1, micro_batch_size=1)
    assert batch.media.grids == ((2, 4, 6),) and not batch.media.patches_NP.any() and batch.targets == 0
    data = open_data(folder / "qwen2_vl", tmp_path, on_error="raise")
    with pytest.raises(UserError, match=r"a\.mp4: not of the size that it had when the data was prepared"):
        read_batches(data, 1, micro_batch_size=1)


def test_models_without_videos_refuse_them(folder: Path, tmp_path: Path) -> None:
    write_rows(tmp_path, [ask(VIDEO, WHERE)])
    with pytest.raises(UserError, match="video data is not supported"):
        open_data(folder / "llava", tmp_path, media_dir=folder, on_error="raise")


def test_without_pyav_a_run_stops(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    write_rows(tmp_path, [ask(VIDEO, WHERE)])
    with pytest.raises(UserError, match=r"PyAV is not installed: pip install 'litgpt\[media\]'"):
        open_data(folder / "qwen2_vl", tmp_path, media_dir=folder, on_error="drop")
