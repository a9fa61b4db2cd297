"""`litgpt download` against a small server that answers as the hub does."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file

from litgpt.commands.download import run
from litgpt.errors import UserError
from litgpt.recipe.store_commands import Download
from litgpt.store.hub import select_files
from litgpt.store.save_model import save_model_folder
from tests.hub import Hub, serve_hub
from tests.store.models import assert_loads, random_model, small, weights


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    model = random_model(small("Llama-2-7b-hf"))
    save_model_folder(tmp_path / "source", config=model.config, tensors=weights(model))
    (tmp_path / "source" / "model_config.yaml").unlink()
    files = {path.name: path.read_bytes() for path in (tmp_path / "source").iterdir()}
    trap = {
        "modeling_evil.py": b"1/0",
        "tokenizer.py": b"1/0",
        "pytorch_model.bin": b"no",
        "onnx/model.safetensors": b"",
    }
    files |= trap | {"tokenizer.json": b"{}", "../outside.json": b"{}"}
    with serve_hub({"org/tiny": files}, monkeypatch) as server:
        yield server


@pytest.fixture
def run_client(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., list[str]]:
    """A function that does downloads given as settings, and returns what a user would read."""

    def run_all(*downloads: dict[str, Any], offline: bool = False) -> list[str]:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        for settings in downloads:
            recipe = Download(**{**settings, "checkpoint_dir": Path(settings["checkpoint_dir"])})
            assert "hf_secret" not in repr(recipe)
            try:
                run(recipe)
            except UserError as error:
                print("error:", error)
        out, err = capsys.readouterr()
        assert "hf_secret" not in out + err
        return out.splitlines()

    return run_all


def test_a_model_is_fetched_checked_and_ready_to_load(
    hub: Hub, run_client: Callable[..., list[str]], tmp_path: Path
) -> None:
    place = {"repo_id": "org/tiny", "checkpoint_dir": str(tmp_path / "a"), "access_token": "hf_secret"}
    messages = run_client(
        place,
        place,
        {**place, "checkpoint_dir": str(tmp_path / "b"), "tokenizer_only": True},
        {**place, "checkpoint_dir": str(tmp_path / "c"), "dtype": "bfloat16"},
        {**place, "repo_id": "org/gated"},
        {**place, "repo_id": "org/absent"},
        {**place, "repo_id": "../../etc/passwd"},
        {**place, "repo_id": "pythia-14"},
    )
    folder = tmp_path / "a" / "org" / "tiny"
    assert messages[:4] == [f"{folder}: ready"] * 2 + [f"{tmp_path / name / 'org' / 'tiny'}: ready" for name in "bc"]
    for line, reason in zip(messages[4:], ["licence", "not on the hub", "not org/name", "did you mean"], strict=True):
        assert line.startswith("error: ") and reason in line
    names = ["config.json", "generation_config.json", "model.safetensors", "model_config.yaml", "tokenizer.json"]
    assert sorted(path.name for path in folder.iterdir() if path.name != ".cache") == names
    assert hub.fetched.count("model.safetensors") == 2, "the second download went on where the first had ended"
    assert_loads(folder, random_model(small("Llama-2-7b-hf")))
    assert not list((tmp_path / "b").rglob("*.safetensors"))
    cast = load_file(tmp_path / "c" / "org" / "tiny" / "model.safetensors")
    assert {tensor.dtype for tensor in cast.values()} == {torch.bfloat16}


def test_a_hub_that_does_not_answer_has_one_line(
    hub: Hub, run_client: Callable[..., list[str]], tmp_path: Path
) -> None:
    hub.shutdown()
    hub.server_close()
    (line,) = run_client({"repo_id": "org/tiny", "checkpoint_dir": str(tmp_path), "access_token": "hf_secret"})
    assert "cannot be reached" in line and "put the model's files into" in line


def test_a_client_that_is_to_stay_offline_says_so(run_client: Callable[..., list[str]], tmp_path: Path) -> None:
    (line,) = run_client({"repo_id": "org/tiny", "checkpoint_dir": str(tmp_path)}, offline=True)
    assert "HF_HUB_OFFLINE is set" in line and not list(tmp_path.glob("org/*"))


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_bytes_that_the_hub_does_not_list_are_not_kept(
    hub: Hub, run_client: Callable[..., list[str]], tmp_path: Path, name: str
) -> None:
    hub.altered = {name}
    place = {"repo_id": "org/tiny", "checkpoint_dir": str(tmp_path / "new")}
    (line,) = run_client(place)
    assert line.startswith("error: ") and name in line and "not those that the hub lists" in line
    assert not (tmp_path / "new" / "org" / "tiny" / name).exists()
    hub.altered = set()
    assert run_client(place) == [f"{tmp_path / 'new' / 'org' / 'tiny'}: ready"]


@pytest.mark.parametrize(
    ("names", "selected"),
    [
        (["a.py", "tokenizer.py", "README.md", "training_args.bin", "optimizer.bin"], []),
        (["pytorch_model.bin", "model.safetensors", "x/model.safetensors"], ["model.safetensors"]),
        (["pytorch_model-00001-of-00001.bin"], ["pytorch_model-00001-of-00001.bin"]),
        (["model-1.safetensors", "model.safetensors.index.json", "consolidated.safetensors"], None),
        (["weights.safetensors", "tokenizer.model", "../up.safetensors"], ["tokenizer.model", "weights.safetensors"]),
        (["chat_template.jinja", "vocab.json", "tokenizer_config.json", "config.json"], None),
        (["preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"], None),
        (["spk_dict.pt", "model.safetensors", "other.pt"], ["model.safetensors", "spk_dict.pt"]),
    ],
)
def test_only_needed_files_are_selected(names: list[str], selected: list[str] | None) -> None:
    expected = [name for name in names if "consolidated" not in name] if selected is None else selected
    assert sorted(select_files(names, tokenizer_only=False)) == sorted(expected)
