"""Conversations and prompts of a model that sees and hears: tokens, media and positions of the published processor."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import (
    AutoModelForMultimodalLM,
    PreTrainedTokenizerFast,
    Qwen2_5OmniProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    WhisperFeatureExtractor,
)

from litgpt.api import LLM
from litgpt.data import Conversations
from litgpt.data.media.containers import read_frames, read_video_header
from litgpt.data.media.pictures import plan_picture
from litgpt.data.media.reader import JointReader, open_media_reader
from litgpt.data.media.sounds import decode_sound
from litgpt.data.media.videos import plan_video, read_video_settings
from litgpt.data.render.placers import build_feature_placer
from litgpt.data.tokenizer import Tokenizer
from litgpt.errors import UserError
from tests.data.modules.test_images import open_data, read_batches
from tests.omni_model import TEMPLATE, WORDS, write_media, write_omni_model
from tests.vision_model import AREA, VOLUME, write_rows

ANSWER = {"role": "assistant", "content": "left"}
PARTS = [
    {"type": "image", "image": "a.png"},
    {"type": "text", "text": "One, "},
    {"type": "audio", "audio": "b.wav"},
    {"type": "video", "video": "c.mp4"},
    {"type": "audio", "audio": "d.wav"},
    {"type": "text", "text": "or two?"},
]
PROMPT = "<image>One, <audio><video><audio>or two?"
SOURCES: dict[str, Any] = {"image": ["a.png"], "audio": ["b.wav", "d.wav"], "video": ["c.mp4"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that sees and hears, and media."""
    root = tmp_path_factory.mktemp("all")
    write_omni_model(root / "model")
    write_media(root)
    return root


def open_row(folder: Path, cache: Path, row: dict[str, Any]) -> Conversations:
    return open_data(folder / "model", cache, sources=str(write_rows(cache, [row])), media_dir=folder)


def build_processor(model: Path) -> Any:
    """The published processor, with the settings of the model's folder."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(model / "tokenizer.json"), extra_special_tokens=WORDS)
    extractor = WhisperFeatureExtractor(feature_size=8, chunk_length=3)
    videos = Qwen2VLVideoProcessor(**VOLUME, fps=2.0)
    return Qwen2_5OmniProcessor(Qwen2VLImageProcessor(**AREA), videos, extractor, tokenizer, TEMPLATE)


def open_joint_reader(model: Path) -> JointReader:
    reader = open_media_reader(model)
    assert isinstance(reader, JointReader)
    return reader


@pytest.fixture(scope="module")
def published(folder: Path) -> Any:
    """What the published processor makes of a question with media and its answer."""
    processor, header = build_processor(folder / "model"), read_video_header(folder / "c.mp4")
    images, sounds = open_joint_reader(folder / "model").parts
    assert images.videos is not None
    plan = plan_video(header, images.videos, images.shape)
    text = processor.apply_chat_template([{"role": "user", "content": PARTS}, ANSWER])
    return processor(
        text=[text],
        images=[Image.open(folder / "a.png")],
        audio=[decode_sound(folder / name, sounds.settings).numpy() for name in SOURCES["audio"]],
        videos=[torch.stack(list(read_frames(folder / "c.mp4", header, plan.frames)))],
        videos_kwargs={"size": VOLUME["size"], "do_sample_frames": False},
        sampling_rate=16000,
        return_tensors="pt",
        add_special_tokens=False,
    )


def test_rows_are_those_of_the_published_processor(folder: Path, published: Any, tmp_path: Path) -> None:
    data = open_row(folder, tmp_path, {"messages": [{"role": "user", "content": PARTS}, ANSWER]})
    (batch,) = read_batches(data, 1, micro_batch_size=1)
    assert batch.ids.tolist() == published["input_ids"].tolist()
    grids = torch.cat([published["image_grid_thw"], published["video_grid_thw"]])
    assert [list(grid) for grid in batch.media.grids] == grids.tolist()
    patches = torch.cat([published["pixel_values"], published["pixel_values_videos"]])
    assert torch.equal(batch.media.patches_NP, patches)
    mask = published["feature_attention_mask"].bool()
    assert batch.media.sounds.lengths == tuple(mask.sum(1).tolist()) == (47, 11)
    assert torch.equal(batch.media.sounds.frames_NM, published["input_features"].mT[mask])
    reference = AutoModelForMultimodalLM.from_pretrained(folder / "model", dtype="float32")
    keys = ("input_ids", "image_grid_thw", "video_grid_thw", "attention_mask")
    expected, _ = reference.get_rope_index(
        **{key: published[key] for key in keys},
        audio_seqlens=mask.sum(1),
        second_per_grids=published["video_second_per_grid"],
    )
    assert torch.equal(batch.positions.transpose(0, 1), expected)
    places = [data.tokenizer.find_token(WORDS[f"{kind}_token"]) for kind in ("image", "audio", "video")]
    assert not torch.isin(batch.labels, torch.tensor(places)).any()  # type: ignore[arg-type]


def test_texts_equal_those_of_transformers(folder: Path, published: Any) -> None:
    llm, reference = (
        LLM.load(folder / "model", distribute=None),
        AutoModelForMultimodalLM.from_pretrained(folder / "model", dtype="float32").eval(),
    )
    sources = {kind: [str(folder / name) for name in names] for kind, names in SOURCES.items()}
    prompt = llm.prompt_encoder().encode(PROMPT, None, None, sources=sources)
    ids = torch.tensor([prompt.ids])
    assert ids.tolist() == published["input_ids"][:, : ids.shape[1]].tolist()
    inputs = {**published, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    output = reference.generate(**inputs, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :].tolist()
    media = {"images": sources["image"], "audios": sources["audio"], "videos": sources["video"]}
    settings = {"max_new_tokens": 8, "temperature": 0, "return_as_token_ids": True}
    ours = llm.generate(PROMPT, **media, **settings).tolist()
    assert ours == output[: len(ours)] and len(ours) > 2


def test_numbers_of_places_are_those_of_the_published_processor(folder: Path) -> None:
    processor, (images, sounds) = build_processor(folder / "model"), open_joint_reader(folder / "model").parts
    draw = torch.Generator().manual_seed(0)
    sizes = torch.randint(10, 200, (200, 2), generator=draw).tolist()
    samples = torch.randint(600, 60_000, (200,), generator=draw).tolist()
    theirs = processor._get_num_multimodal_tokens(image_sizes=sizes, audio_lengths=samples)
    plans = [plan_picture(tuple(size), images.settings, 8) for size in sizes]
    assert [height * width // 4 for plan in plans for _, height, width in images.list_grids(plan)] == theirs[
        "num_image_tokens"
    ]
    frames = map(sounds.settings.count_frames, samples)
    assert list(map(sounds.shape.count_features, frames)) == theirs["num_audio_tokens"]


def test_settings_of_images_are_not_for_videos(folder: Path, tmp_path: Path) -> None:
    """The published folder has one file, of images and sounds, and its processor sizes videos itself."""
    name = "preprocessor_config.json"
    (tmp_path / name).write_bytes((folder / "model" / name).read_bytes())
    settings = read_video_settings(tmp_path, "Qwen2VLVideoProcessor", is_shared=False)
    assert dict(settings.limits) == Qwen2_5OmniProcessor.videos_kwargs["size"]
    assert dict(read_video_settings(tmp_path, "Qwen2VLVideoProcessor").limits) == AREA["size"]


def test_kinds_and_media_that_are_missing(folder: Path, tmp_path: Path) -> None:
    placer = build_feature_placer(open_joint_reader(folder / "model"), Tokenizer(folder / "model"))
    assert [*placer.kinds] == ["image", "video", "audio"]
    for kind, name in (("image", "a.png"), ("audio", "b.wav"), ("video", "c.mp4")):
        row = ask_after_media(image="a.png", audio="b.wav", video="c.mp4") | {f"{kind}s": [f"no-{name}"]}
        with pytest.raises(UserError, match=f"no-{name}"):
            open_row(folder, tmp_path, row)


def ask_after_media(**names: str) -> dict[str, Any]:
    """A row with a medium of each kind."""
    text = "".join(f"<{kind}>" for kind in names)
    columns = {f"{kind}s": [name] for kind, name in names.items()}
    return {"messages": [{"role": "user", "content": f"{text}Which?"}, ANSWER], **columns}
