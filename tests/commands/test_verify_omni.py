"""litgpt verify of models that see and hear."""

from pathlib import Path

import pytest

from litgpt.cli import main
from tests.commands.test_verify_images import NAMES
from tests.omni_model import write_omni_model

MEDIA = ("images", "videos", "sounds")


def test_a_folder_with_two_towers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_omni_model(tmp_path / "model")
    (folder / "tokenizer.json").unlink()
    assert main(["verify", str(folder), "--length", "24"]) == 0
    lines = [line.split(": ") for line in capsys.readouterr().out.splitlines()]
    results = {words[0]: words[1] for words in lines if words[0] in (*NAMES, *MEDIA)}
    assert results == dict.fromkeys((*NAMES, *MEDIA), "passed")
