"""Sounds that are longer than the model hears: errors or, as `split_sounds` says, pieces that leave nothing out."""

import wave
from pathlib import Path
from typing import Any

import pytest
import torch

from litgpt.api import LLM
from litgpt.cli import main
from litgpt.data.media import long_sounds, sounds
from litgpt.data.media.containers import import_av
from litgpt.data.media.sounds import SoundSettings, decode_pieces, decode_sound
from litgpt.data.read.media import Medium
from litgpt.errors import UserError
from tests.audio_model import draw_sound, write_audio_model
from tests.chat_model import write_chat_model
from tests.data.modules.test_sounds import ask, open_data, read_batches
from tests.faults.bad_sounds import record
from tests.vision_model import write_rows

SETTINGS = SoundSettings(rate=16000, window=400, hop=160, mels=8, seconds=1)
TEXTS: dict[str, Any] = {"max_new_tokens": 6, "temperature": 0}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_audio_model(tmp_path_factory.mktemp("models") / "model")


@pytest.fixture
def long(tmp_path: Path) -> Path:
    """A sound of 2.5 seconds, for a model that hears one; beside it, its three pieces."""
    path = tmp_path / draw_sound(tmp_path / "long.wav", 300.0, 2.5)
    with wave.open(str(path), "rb") as file:
        for number in range(3):
            with wave.open(str(tmp_path / f"piece{number}.wav"), "wb") as piece:
                piece.setparams(file.getparams())
                piece.writeframes(file.readframes(13334))
    return path


def test_rows_have_all_of_a_long_sound(model: Path, long: Path) -> None:
    pieces = [f"piece{number}.wav" for number in range(3)]
    write_rows(long.parent, [ask("long.wav"), {**ask("x", "<audio><audio><audio>Which?"), "audios": pieces}])
    for tokenize in ("ahead", "lazy"):
        data = open_data(model, long.parent, split_sounds=True, tokenize=tokenize)
        split, given = read_batches(data, 2, micro_batch_size=1)
        assert torch.equal(split.ids, given.ids) and torch.equal(split.labels, given.labels)
        assert split.media.sounds.lengths == given.media.sounds.lengths == (84, 84, 84)
        assert torch.equal(split.media.sounds.frames_NM, given.media.sounds.frames_NM)
    data = open_data(model, long.parent, on_error="drop", split_sounds=False)
    (batch,) = read_batches(data, 1, micro_batch_size=1)
    assert len(batch.ids) == 1 and batch.media.sounds.lengths == (84, 84, 84)


@pytest.mark.parametrize(("form", "codec"), [("mp3", "libmp3lame"), ("flac", "flac"), ("ogg", "libopus")])
def test_pieces_are_those_of_the_whole(form: str, codec: str, tmp_path: Path) -> None:
    data = record(form, codec, 40_000)
    whole = decode_sound(data, SoundSettings(rate=16000, window=400, hop=160, mels=8, seconds=3))
    (tmp_path / "long").write_bytes(data)
    medium = Medium(path=str(tmp_path / "long"), kind="audio")
    pieces = long_sounds.split_sound(medium, SETTINGS)
    assert len(pieces) == 3 and [piece.start for piece in pieces[1:]] == [piece.stop for piece in pieces[:2]]
    alone = [next(decode_pieces(data, SETTINGS, [piece.samples])) for piece in pieces]
    assert torch.equal(torch.cat(alone), whole)
    some = list(decode_pieces(data, SETTINGS, [pieces[0].samples, range(20_000, 20_001), pieces[2].samples]))
    assert torch.equal(torch.cat([some[0], alone[1], some[2]]), whole) and some[1] == whole[20_000]


def test_a_long_sound_is_decoded_once(model: Path, long: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its pieces are decoded in one pass, also beside other sounds, and twice if it is there twice."""
    opened = list[Any]()
    write_rows(long.parent, [{**ask("x", "<audio><audio><audio>?"), "audios": ["long.wav", "piece0.wav", "long.wav"]}])
    data = open_data(model, long.parent, split_sounds=True)
    monkeypatch.setattr(sounds, "import_av", lambda kind: opened.append(kind) or import_av(kind))
    (batch,) = read_batches(data, 1, micro_batch_size=1)
    assert batch.media.sounds.lengths == (84,) * 7 and len(opened) == 3
    llm = LLM.load(model, distribute=None)
    llm.split_sounds = True
    opened.clear()
    prompt = llm.prompt_encoder().encode("<audio>?", None, None, sources={"audio": [str(long)]})
    before = len(opened)
    images = prompt.load_images()
    assert images is not None and len(images.images) == 3 and len(opened) == before + 1


def test_limits_of_pieces(model: Path, long: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_rows(long.parent, [ask("long.wav")])
    monkeypatch.setattr(long_sounds, "MOST_PIECES", 2)
    with pytest.raises(UserError, match=r"sound that is too long \(2.5 s\); cut it into pieces of at most 2 s"):
        open_data(model, long.parent, split_sounds=True)
    monkeypatch.undo()
    data = open_data(model, long.parent, split_sounds=True)
    draw_sound(long, 300.0, 1.5)
    with pytest.raises(UserError, match="not a sound that can be read"):
        read_batches(data, 1)


def test_prompts_have_all_of_a_long_sound(model: Path, long: Path, capsys: pytest.CaptureFixture[str]) -> None:
    llm = LLM.load(model, distribute=None)
    with pytest.raises(UserError, match=r"sound that is too long \(2.5 s\); cut it into pieces of at most 1 s"):
        llm.generate("Which?", audios=[long], **TEXTS)
    expected = llm.generate("Which?", audios=[long.parent / f"piece{number}.wav" for number in range(3)], **TEXTS)
    llm.split_sounds = True
    assert llm.generate("Which?", audios=[long], **TEXTS) == expected
    line = ["generate", str(model), "--max_new_tokens", "6", "--temperature", "0", "--prompt", "Which?"]
    assert main([*line, "--audio", str(long), "--split_sounds", "true"]) == 0
    assert capsys.readouterr().out == f"{expected}\n"


def test_models_that_do_not_hear_split_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_chat_model(tmp_path / "model")
    assert main(["generate", str(tmp_path / "model"), "--split_sounds", "true"]) != 0
    assert "split_sounds: true has no effect on a model without an audio tower; leave it out" in capsys.readouterr().err
