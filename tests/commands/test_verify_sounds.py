"""litgpt verify of models with an audio tower: sounds by the folder's processor, and logits of a text with them."""

from pathlib import Path

import pytest
import torch

from litgpt.cli import main
from litgpt.infer import sound_parity
from tests.audio_model import write_audio_model
from tests.commands.test_verify_images import NAMES


def verify_folder(folder: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, str]]:
    """The exit code of a verification, and the result of each check but that of the tokenizer."""
    capsys.readouterr()
    code = main(["verify", str(folder), "--length", "24"])
    lines = [line.split(": ") for line in capsys.readouterr().out.splitlines()]
    return code, {words[0]: words[1] for words in lines if words[0] in (*NAMES, "sounds")}


def test_a_folder_with_an_audio_tower(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_audio_model(tmp_path / "model")
    (folder / "tokenizer.json").unlink()
    assert verify_folder(folder, capsys) == (0, dict.fromkeys((*NAMES, "sounds"), "passed"))
    with monkeypatch.context() as patch:
        patch.setattr(sound_parity, "compute_log_mel", lambda sound, _: torch.full((100, 8), float(sound[0])))
        code, results = verify_folder(folder, capsys)
    assert code == 1 and results == {**dict.fromkeys(NAMES, "passed"), "sounds": "FAILED"}
    (folder / "preprocessor_config.json").unlink()
    assert verify_folder(folder, capsys)[1]["sounds"] == "skipped"
