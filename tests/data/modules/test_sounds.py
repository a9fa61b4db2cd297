"""Conversations with sounds: places, labels, frames, faults and batches."""

import base64
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast, Qwen2AudioProcessor, WhisperFeatureExtractor

from litgpt.data import Conversations
from litgpt.data.media.sounds import SoundSettings, decode_sound
from litgpt.data.modules.finetuning import Packing
from litgpt.data.tokenizer import Tokenizer
from litgpt.errors import UserError
from litgpt.recipe.data import BatchShape
from tests.audio_model import EXTRACTOR, TEMPLATE, draw_sound, write_audio_model, write_sound_rows
from tests.vision_model import write_rows

SHAPE = BatchShape(micro_batch_size=2, global_batch_size=4, max_seq_length=256, rank=0, ranks=1, seed=0)
SETTINGS = SoundSettings(rate=16000, window=400, hop=160, mels=8, seconds=1)
ANSWER = {"role": "assistant", "content": "low"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_audio_model(tmp_path_factory.mktemp("models") / "model")


def open_data(model: Path, folder: Path, **settings: Any) -> Conversations:
    options = {"sources": str(folder / "rows.jsonl"), "val_fraction": 0.0, "num_workers": 0, "shuffle": False}
    data = Conversations(cache_dir=folder / "cache", **{**options, **settings})
    data.connect(Tokenizer(model), 2, SHAPE.max_seq_length)
    data.prepare_data()
    return data


def ask(sound: Any, text: str = "<audio>Which?") -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}, ANSWER], "audios": [sound]}


def read_batches(data: Conversations, number: int, **shape: Any) -> list[Any]:
    stream = iter(data.train_stream(BatchShape(**{**vars(SHAPE), **shape})))
    return [next(stream) for _ in range(number)]


def test_tokens_and_frames_are_those_of_the_published_processor(model: Path, tmp_path: Path) -> None:
    names = [draw_sound(tmp_path / f"{rate}.wav", 300.0, 0.33, rate) for rate in (16000, 8000)]
    row = {"role": "user", "content": "<audio>One, <audio>or two?"}
    write_rows(tmp_path, [{"messages": [row, ANSWER], "audios": names}])
    (batch,) = read_batches(open_data(model, tmp_path), 1, micro_batch_size=1)
    words = {"audio_token": "<|AUDIO|>", "audio_bos_token": "<|audio_bos|>", "audio_eos_token": "<|audio_eos|>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(model / "tokenizer.json"), extra_special_tokens=words)
    extractor = WhisperFeatureExtractor(feature_size=8, chunk_length=EXTRACTOR["chunk_length"])
    processor = Qwen2AudioProcessor(extractor, tokenizer, chat_template=TEMPLATE)
    parts = [
        {"type": "audio"},
        {"type": "text", "text": "One, "},
        {"type": "audio"},
        {"type": "text", "text": "or two?"},
    ]
    text = processor.apply_chat_template([{"role": "user", "content": parts}, ANSWER])
    sounds = [decode_sound(tmp_path / name, SETTINGS).numpy() for name in names]
    theirs = processor(text=[text], audio=sounds, sampling_rate=16000, return_tensors="pt", add_special_tokens=False)
    assert batch.ids[0].tolist() == theirs["input_ids"][0].tolist()
    lengths = theirs["feature_attention_mask"].sum(1).tolist()
    assert batch.media.sounds.lengths == tuple(lengths) == (33, 33)
    frames = batch.media.sounds.frames_NM.split([35, 35])
    for ours, expected in zip(frames, theirs["input_features"], strict=True):
        torch.testing.assert_close(ours.T, expected[:, :35], atol=1e-6, rtol=0)
    sound = data_token(model)
    assert not (batch.labels == sound).any() and (batch.ids == sound).sum() == 2 * 8


def data_token(model: Path) -> int:
    token = Tokenizer(model).find_token("<|AUDIO|>")
    assert token is not None
    return token


def test_forms_of_rows_are_the_same(model: Path, tmp_path: Path) -> None:
    path = tmp_path / draw_sound(tmp_path / "a.wav", 300.0, 0.3)
    encoded = base64.b64encode(path.read_bytes()).decode()
    question = {"type": "text", "text": "Which?"}
    blocks = [
        {"type": "audio", "audio": "a.wav"},
        {"type": "audio", "audio_url": "a.wav"},
        {"type": "audio_url", "audio_url": {"url": f"data:audio/wav;base64,{encoded}"}},
        {"type": "input_audio", "input_audio": {"data": encoded, "format": "wav"}},
    ]
    rows: list[Any] = [{"messages": [{"role": "user", "content": [block, question]}, ANSWER]} for block in blocks]
    rows += [ask("a.wav"), ask("a.wav", "Which?"), {**ask("a.wav"), "audios": None, "audio": "a.wav"}]
    write_rows(tmp_path, rows)
    batches = read_batches(open_data(model, tmp_path), len(rows), micro_batch_size=1)
    for batch in batches:
        assert torch.equal(batch.ids, batches[0].ids) and torch.equal(batch.labels, batches[0].labels)
        assert torch.equal(batch.media.sounds.frames_NM, batches[0].media.sounds.frames_NM)


@pytest.mark.parametrize(
    "settings",
    [{}, {"padding": True}, {"packing": Packing(True, strategy="sequential")}, {"tokenize": "lazy"}],
    ids=str,
)
def test_places_are_as_many_as_features(settings: dict[str, Any], model: Path, tmp_path: Path) -> None:
    write_sound_rows(tmp_path)
    sound, total = data_token(model), 0
    micro = 1 if "packing" in settings else 2
    for batch in read_batches(open_data(model, tmp_path, **settings), 4 if micro == 2 else 1, micro_batch_size=micro):
        lengths = () if batch.media is None else batch.media.sounds.lengths
        places = sum(((length - 1) // 2 + 1) // 2 for length in lengths)
        assert (batch.ids == sound).sum() == places
        total += places
    assert total > 5


def test_bad_sounds_are_counted_and_named(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = tmp_path / draw_sound(tmp_path / "good.wav", 300.0, 0.3)
    draw_sound(tmp_path / "long.wav", 300.0, 1.2)
    draw_sound(tmp_path / "short.wav", 300.0, 0.02)
    (tmp_path / "cut.wav").write_bytes(good.read_bytes()[:-100])
    (tmp_path / "text.wav").write_text("#EXTM3U\ngood.wav\n")
    rows = [ask(name) for name in ("good.wav", "long.wav", "short.wav", "cut.wav", "text.wav", "none.wav", "../a.wav")]
    rows += [ask("https://example.com/a.wav"), ask("good.wav", "<audio><audio>"), ask("good.wav", "<|AUDIO|>")]
    rows += [{"messages": [{"role": "user", "content": "Which?"}, ANSWER], "images": ["good.wav"]}]
    write_rows(tmp_path, rows)
    data = open_data(model, tmp_path, on_error="drop")
    (batch,) = read_batches(data, 1, micro_batch_size=1)
    assert batch.media.sounds.lengths == (30,)
    said = capsys.readouterr().err
    for reason in (
        "sound that is too long",
        "audio of a size that the model does not read",
        "not a sound that can be read",
        "sound not found",
        "audio outside of the folder of the data",
        "audio at a URL is not supported",
        "more places for audios than audios",
        "image data is not supported",
    ):
        assert reason in said, reason
    write_rows(tmp_path, [ask("long.wav")])
    with pytest.raises(
        UserError, match=r"long.wav: sound that is too long \(1.2 s\); cut it into pieces of at most 1 s"
    ):
        open_data(model, tmp_path, on_error="raise")


def test_a_sound_that_changes_after_preparation(model: Path, tmp_path: Path) -> None:
    draw_sound(tmp_path / "a.wav", 300.0, 0.3)
    write_rows(tmp_path, [ask("a.wav")])
    data = open_data(model, tmp_path, on_error="drop")
    draw_sound(tmp_path / "a.wav", 300.0, 0.5)
    (batch,) = read_batches(data, 1, micro_batch_size=1)
    assert not batch.media.sounds.frames_NM.any() and batch.targets == 0
    data = open_data(model, tmp_path, on_error="raise")
    draw_sound(tmp_path / "a.wav", 300.0, 0.4)
    with pytest.raises(UserError, match=r"not of the length that it had when the data was prepared"):
        read_batches(data, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"feature_size": 80}, "feature_size is 80, but the audio tower reads 8"), ({"chunk_length": 2}, "frames is 200")],
)
def test_processors_of_other_towers_are_refused(
    change: dict[str, Any], message: str, model: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for path in model.iterdir():
        (folder / path.name).symlink_to(path)
    (folder / "preprocessor_config.json").unlink()
    (folder / "preprocessor_config.json").write_text(json.dumps({**EXTRACTOR, **change}))
    write_sound_rows(tmp_path)
    with pytest.raises(UserError, match=message):
        open_data(folder, tmp_path)
