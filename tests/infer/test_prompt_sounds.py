"""Prompts with sounds: texts as those of transformers, sources, what is shared, and what is refused."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from litgpt.api import LLM
from litgpt.cli import main
from litgpt.data.media.sounds import SoundSettings, compute_log_mel, decode_sound
from litgpt.errors import UserError
from tests.audio_model import draw_sound, write_audio_model
from tests.chat_model import write_chat_model

SETTINGS: dict[str, Any] = {"max_new_tokens": 6, "temperature": 0}
PROMPT = "<audio> or <audio>: which?"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that hears, and sounds."""
    root = tmp_path_factory.mktemp("hearing")
    write_audio_model(root / "model")
    draw_sound(root / "low.wav", 200.0, 0.31)
    draw_sound(root / "high.wav", 3000.0, 0.5, 44100)
    return root


@pytest.fixture(scope="module")
def llm(folder: Path) -> LLM:
    return LLM.load(folder / "model", distribute=None)


def hear(llm: LLM, audios: Any, prompt: str = "Which?") -> list[int]:
    """The tokens after a question to sounds."""
    return llm.generate(prompt, audios=audios, return_as_token_ids=True, **SETTINGS).tolist()


def test_texts_equal_those_of_transformers(llm: LLM, folder: Path) -> None:
    names = ["low.wav", "high.wav"]
    prompt = llm.prompt_encoder().encode(PROMPT, None, None, sources={"audio": [str(folder / name) for name in names]})
    settings = SoundSettings(rate=16000, window=400, hop=160, mels=8, seconds=1)
    sounds = [decode_sound(folder / name, settings) for name in names]
    features = torch.stack([compute_log_mel(sound, settings).T for sound in sounds])
    mask = torch.arange(100) < torch.tensor([settings.count_frames(len(sound)) for sound in sounds])[:, None]
    model = transformers.AutoModelForMultimodalLM.from_pretrained(folder / "model", dtype="float32").eval()
    ids = torch.tensor([prompt.ids])
    inputs = {"input_features": features, "feature_attention_mask": mask.long(), "attention_mask": torch.ones_like(ids)}
    expected = model.generate(input_ids=ids, **inputs, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :].tolist()
    ours = hear(llm, [folder / name for name in names], PROMPT)
    assert ours == expected[: len(ours)] and len(ours) > 2


def test_sounds_are_paths_or_bytes_and_change_the_text(llm: LLM, folder: Path) -> None:
    path = folder / "low.wav"
    expected = hear(llm, [path])
    assert hear(llm, path.read_bytes()) == hear(llm, [str(path)]) == expected
    other, text = hear(llm, [folder / "high.wav"]), hear(llm, None)
    assert expected != text
    lists = [[path], [folder / "high.wav"], []]
    ids = llm.generate(["Which?"] * 3, audios=lists, return_as_token_ids=True, **SETTINGS)
    assert [each.tolist() for each in ids] == [expected, other, text]


WRONG: list[tuple[Any, Any, str]] = [
    ("Which?", ["none.wav"], "none.wav: sound not found (no such file)"),
    ("Which?", [b"nothing"], "audio: not a sound that can be read (sound: not a sound that can be read"),
    ("Which?", [3], "audios: int is no audio; give a path, or the bytes of a file"),
    ("<audio><audio>", ["low.wav"], "audio: more places for audios than audios (2 places, 1 audios)"),
    ("<|AUDIO|>", None, "which stands for a sound, without a sound; give one, or leave it out"),
]


@pytest.mark.parametrize(("prompt", "audios", "text"), WRONG)
def test_wrong_sounds_are_one_line(
    prompt: Any, audios: Any, text: str, llm: LLM, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    with pytest.raises(UserError) as error:
        llm.generate(prompt, audios=audios, **SETTINGS)
    assert text in str(error.value) and "\n" not in str(error.value)


def test_models_that_do_not_hear_refuse_sounds(folder: Path, tmp_path: Path) -> None:
    deaf = LLM.load(write_chat_model(tmp_path / "model"), distribute=None)
    with pytest.raises(
        UserError, match=r"^audio: the model has no audio tower; leave it out, or use a model that hears"
    ):
        deaf.generate("Which?", audios=[folder / "low.wav"], **SETTINGS)


def test_a_chat_has_sounds(
    llm: LLM,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lines = [f"/audio {folder}/none.wav", f"/audio {folder}/low.wav", "/audio", f"/audio {folder}/high.wav"]
    lines += [f"/image {folder}/low.wav", "Which?", "Hello", f"/save {tmp_path}/chat.jsonl", ""]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    assert main(["chat", str(folder / "model"), "--max_new_tokens", "6", "--temperature", "0"]) == 0
    out, err = capsys.readouterr()
    assert "none.wav: sound not found" in err and "image: image data is not supported (by this model)" in err
    assert [line for line in out.splitlines() if line.startswith("Audios of")] == [
        f"Audios of the next message: {count}" for count in (1, 0, 1)
    ]
    messages = json.loads((tmp_path / "chat.jsonl").read_text())["messages"]
    sound = {"type": "audio", "path": f"{folder}/high.wav"}
    assert messages[0]["content"] == [sound, {"type": "text", "text": "Which?"}] and messages[2]["content"] == "Hello"
    assert messages[1]["content"] == llm.generate("Which?", audios=[folder / "high.wav"], **SETTINGS)


def test_the_command_takes_sounds(
    llm: LLM, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    line = ["generate", "model", "--max_new_tokens", "6", "--temperature", "0", "--prompt", PROMPT]
    assert main([*line, "--audio", "[low.wav, high.wav]"]) == 0
    expected = llm.generate(PROMPT, audios=["low.wav", "high.wav"], **SETTINGS)
    assert expected in capsys.readouterr().out
    assert main([*line, "--audio", "none.wav"]) != 0
    assert "audio: none.wav is not a file; give the path of a sound" in capsys.readouterr().err
