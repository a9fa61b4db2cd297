"""Videos with their sound tracks: tokens, media, positions, logits and texts of the published processor and model."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoModelForMultimodalLM

from litgpt.api import LLM
from litgpt.cli import main
from litgpt.data.media.containers import read_frames, read_video_header
from litgpt.data.media.sounds import decode_sound
from litgpt.data.media.videos import plan_video
from litgpt.data.preview import mark_trained
from litgpt.errors import UserError
from litgpt.infer.prompt_images import PromptImages
from litgpt.recipe.serve import Serve
from tests.data.modules.test_images import open_data, read_batches
from tests.data.modules.test_omni import ANSWER, build_processor, open_joint_reader
from tests.infer.server.test_videos_and_sounds import ask as ask_server
from tests.infer.server.test_videos_and_sounds import build_url
from tests.infer.server.tiny_server import run_server
from tests.omni_model import write_media, write_omni_model
from tests.video_files import draw_tone, write_video
from tests.vision_model import VOLUME, write_rows

PARTS = [
    {"type": "image", "image": "a.png"},
    {"type": "video", "video": "long.mkv"},
    {"type": "text", "text": "One, "},
    {"type": "audio", "audio": "b.wav"},
    {"type": "video", "video": "short.mkv"},
    {"type": "text", "text": "or two?"},
]
PROMPT = "<image><video>One, <audio><video>or two?"
SOURCES = {"image": ["a.png"], "video": ["long.mkv", "short.mkv"], "audio": ["b.wav"]}
SOUNDS = ("long.mkv", "b.wav", "short.mkv")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that hears videos, one longer than its sound, one shorter, and media without a sound track."""
    root = tmp_path_factory.mktemp("tracks")
    write_omni_model(root / "model")
    write_media(root)
    write_video(root / "long.mkv", 22, (16, 24), rate=4, sound=draw_tone(2.9), seed=1)
    write_video(root / "short.mkv", 4, (24, 16), rate=4, sound=draw_tone(2.6), seed=2)
    return root


@pytest.fixture(scope="module")
def published(folder: Path) -> dict[str, Any]:
    """What the published processor makes of a question with media and its answer."""
    processor, (images, sounds) = build_processor(folder / "model"), open_joint_reader(folder / "model").parts
    assert images.videos is not None
    videos = []
    for name in SOURCES["video"]:
        header = read_video_header(folder / name)
        plan = plan_video(header, images.videos, images.shape)
        videos.append(torch.stack(list(read_frames(folder / name, header, plan.frames))))
    text = processor.apply_chat_template([{"role": "user", "content": PARTS}, ANSWER])
    return dict(
        processor(
            text=[text],
            images=[Image.open(folder / "a.png")],
            audio=[decode_sound(folder / name, sounds.settings).numpy() for name in SOUNDS],
            videos=videos,
            audio_from_video_indices=[0, None, 1],
            load_audio_from_video=True,
            position_id_per_seconds=5,
            videos_kwargs={"size": VOLUME["size"], "do_sample_frames": False},
            sampling_rate=16000,
            return_tensors="pt",
            add_special_tokens=False,
        )
    )


def test_rows_are_those_of_the_published_processor(folder: Path, published: dict[str, Any], tmp_path: Path) -> None:
    rows = write_rows(tmp_path, [{"messages": [{"role": "user", "content": PARTS}, ANSWER]}])
    data = open_data(folder / "model", tmp_path, sources=str(rows), media_dir=folder, video_sounds=True)
    (batch,) = read_batches(data, 1, micro_batch_size=1)
    (_, file), *_ = data.prepared
    shown = mark_trained(file.read(0), data.tokenizer).plain
    assert (
        "[video long.mkv: 5.0 s, 5 of " in shown and shown.count("with its sound, ") == 2 == shown.count("[audio") + 1
    )
    assert batch.ids.tolist() == published["input_ids"].tolist()
    grids = torch.cat([published["image_grid_thw"], published["video_grid_thw"]])
    assert [list(grid) for grid in batch.media.grids] == grids.tolist()
    patches = torch.cat([published["pixel_values"], published["pixel_values_videos"]])
    assert torch.equal(batch.media.patches_NP, patches)
    mask = published["feature_attention_mask"].bool()
    assert batch.media.sounds.lengths == tuple(mask.sum(1).tolist()) == (290, 47, 260)
    assert torch.equal(batch.media.sounds.frames_NM, published["input_features"].mT[mask])

    reference = AutoModelForMultimodalLM.from_pretrained(folder / "model", dtype="float32").eval()
    keys = ("input_ids", "image_grid_thw", "video_grid_thw", "attention_mask")
    expected, _ = reference.get_rope_index(
        **{key: published[key] for key in keys},
        use_audio_in_video=True,
        audio_seqlens=mask.sum(1),
        second_per_grids=torch.as_tensor(published["video_second_per_grid"]),
    )
    assert torch.equal(batch.positions.transpose(0, 1), expected)
    model = LLM.load(folder / "model", distribute=None).model
    with torch.no_grad():
        logits = model(batch.ids, media=batch.media, positions_BT=batch.positions)
        theirs = reference(**published, use_audio_in_video=True, use_cache=False).logits
    torch.testing.assert_close(logits, theirs, atol=1e-5, rtol=1e-5)


def test_texts_equal_those_of_transformers(folder: Path, published: dict[str, Any]) -> None:
    llm = LLM.load(folder / "model", distribute=None)
    llm.video_sounds = True
    sources = {kind: [str(folder / name) for name in names] for kind, names in SOURCES.items()}
    prompt = llm.prompt_encoder().encode(PROMPT, None, None, sources=sources)
    ids = torch.tensor([prompt.ids])
    assert ids.tolist() == published["input_ids"][:, : ids.shape[1]].tolist()
    images = prompt.load_images()
    assert isinstance(images, PromptImages) and len(images.images) == 6
    places = [place for image in images.images for place in image.places]
    assert len(places) == len(set(places))  # each of one medium
    reference = AutoModelForMultimodalLM.from_pretrained(folder / "model", dtype="float32").eval()
    inputs = {**published, "input_ids": ids, "attention_mask": torch.ones_like(ids), "use_audio_in_video": True}
    output = reference.generate(**inputs, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :].tolist()
    media = {"images": sources["image"], "audios": sources["audio"], "videos": sources["video"]}
    ours = llm.generate(PROMPT, **media, max_new_tokens=8, temperature=0, return_as_token_ids=True).tolist()
    assert ours == output[: len(ours)] and len(ours) > 2
    recipe = Serve(folder / "model", max_new_tokens=8, temperature=0, video_sounds=True)
    with run_server(recipe) as (address, _):
        parts = [build_url("video", (folder / "long.mkv").read_bytes(), "x-matroska")]
        answer = ask_server(address, *parts, text="Which?")
    assert answer == llm.generate("Which?", videos=[sources["video"][0]], max_new_tokens=8, temperature=0)
    llm.video_sounds = False
    assert llm.prompt_encoder().encode(PROMPT, None, None, sources=sources).ids != prompt.ids


def ask(*videos: str, text: str = "Which?") -> dict[str, Any]:
    content = "<video>" * len(videos) + text
    return {"messages": [{"role": "user", "content": content}, ANSWER], "videos": list(videos)}


def test_videos_without_a_sound_and_with_bad_ones(folder: Path, tmp_path: Path) -> None:
    """A video without a track is read as its frames alone; a track that cannot be read is an error of its row."""
    write_video(folder / "hour.mkv", 4, (16, 24), rate=4, sound=draw_tone(3.2))  # of a model that hears 3 s
    rows = [ask("c.mp4"), ask("short.mkv"), ask("hour.mkv"), ask("c.mp4", "short.mkv")]
    path = str(write_rows(tmp_path, rows))
    settings: dict[str, Any] = {"sources": path, "media_dir": folder, "on_error": "drop", "shuffle": False}
    plain = open_data(folder / "model", tmp_path, **settings)
    heard = open_data(folder / "model", tmp_path, video_sounds=True, **settings)
    assert plain.report()[path]["reasons"] == {}
    assert heard.report()[path]["reasons"] == {"sound that is too long": 1}
    silent, tracked, both = read_batches(heard, 3, micro_batch_size=1)
    assert torch.equal(silent.ids, read_batches(plain, 1, micro_batch_size=1)[0].ids)
    assert silent.media.sounds is None and tracked.media.sounds.lengths == both.media.sounds.lengths == (260,)


def test_formats_of_videos_and_other_models(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    llm = LLM.load(folder / "model", distribute=None)
    llm.video_sounds = True
    for form, codec in {"mp4": "aac", "mov": "pcm_s16le", "avi": "pcm_s16le", "webm": "libopus", "ts": "aac"}.items():
        path = tmp_path / f"a.{form}"
        codec_of_frames = {"webm": "libvpx", "avi": "mpeg4"}.get(form, "libx264")
        rate = 48000 if codec == "libopus" else 16000
        settings: dict[str, Any] = {"codec": codec_of_frames, "sound_codec": codec, "sound_rate": rate}
        write_video(path, 4, (16, 24), rate=4, sound=draw_tone(0.5), **settings)
        prompt = llm.prompt_encoder().encode("<video>?", None, None, sources={"video": [str(path)]})
        assert [each.medium.kind for each in prompt.media] == ["video", "audio"], form
        assert prompt.load_images() is not None
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": "<video>?", "videos": ["a.mp4"]}) + "\n")
    line = ["generate", str(folder / "model"), "--prompts", str(tmp_path / "prompts.jsonl"), "--max_new_tokens", "2"]
    assert main([*line, "--video_sounds", "true"]) == 0
    from tests.vision_model import write_vision_model

    other = write_vision_model(tmp_path / "qwen2_vl", "qwen2_vl")
    capsys.readouterr()
    assert main(["generate", str(other), "--video_sounds", "true"]) != 0
    message = "video_sounds: true has no effect on a model that does not hear videos; leave it out"
    assert message in capsys.readouterr().err
    with pytest.raises(UserError, match=f"data.{message}"):
        open_data(other, tmp_path, sources=str(write_rows(tmp_path, [ask("a.mp4")])), video_sounds=True)
