"""`generate_speculatively` writes the texts of `generate` with the target model."""

import json
from pathlib import Path

import pytest

from litgpt.cli import main
from tests.commands.tiny_models import write_tiny_models

GREEDY = ["--temperature", "0", "--max_new_tokens", "12"]
Captured = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    write_tiny_models(root, "draft", "target")
    return root


def test_texts_are_those_of_the_target(models: Path, capsys: Captured) -> None:
    assert main(["generate", str(models / "target"), "--prompt", "the fox", *GREEDY]) == 0
    expected = capsys.readouterr().out
    rates = []
    for draft in ("draft", "target"):
        folders = [str(models / draft), str(models / "target")]
        assert main(["generate_speculatively", *folders, "--prompt", "the fox", "--speculative_k", "4", *GREEDY]) == 0
        out, err = capsys.readouterr()
        assert out == expected
        rates.append(err.splitlines()[-1])
    assert rates[1] == "Acceptance rate: 1.00 (8 of 8 proposed tokens)"  # and 4 of the target
    assert rates[0].startswith("Acceptance rate: 0.") and rates[0] != rates[1]


def test_texts_of_a_file(models: Path, tmp_path: Path, capsys: Captured) -> None:
    (tmp_path / "prompts.txt").write_text("the fox\na cat\nthe dog\n")
    line = ["--prompts", str(tmp_path / "prompts.txt"), "--logprobs", "2", *GREEDY]
    assert main(["generate", str(models / "target"), *line]) == 0
    expected = [json.loads(row) for row in capsys.readouterr().out.splitlines()]
    assert main(["generate_speculatively", str(models / "draft"), str(models / "target"), *line]) == 0
    out, err = capsys.readouterr()
    texts = [json.loads(row) for row in out.splitlines()]
    assert [row["text"] for row in texts] == [row["text"] for row in expected] and len(texts) == 3
    for row, other in zip(texts, expected, strict=True):
        values = [token["logprob"] for token in row["logprobs"]]
        assert values == pytest.approx([token["logprob"] for token in other["logprobs"]], abs=1e-4)
    assert "Acceptance rate: " in err


def test_both_models_are_checked(models: Path, capsys: Captured) -> None:
    folder = str(models / "target")
    for line, key in {
        ("none", folder): "draft_model_checkpoint_dir",
        (folder, "none"): "target_model_checkpoint_dir",
    }.items():
        assert main(["generate_speculatively", *line]) == 1
        assert capsys.readouterr().err.startswith(f"litgpt: error: {key}: none is not a folder")
