"""The model of each checkpoint is uploaded to the hub while training goes on, also if the network is lost meanwhile."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors.torch import load, load_file

from litgpt.cli import main
from litgpt.store import object_store
from tests.commands.tiny_models import write_tiny_models
from tests.hub import serve_hub
from tests.runs import read_losses, write_recipe, write_text

pytestmark = pytest.mark.slow


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with a text and a recipe of two steps whose checkpoints are uploaded."""
    monkeypatch.chdir(tmp_path)
    write_text(tmp_path)
    write_recipe(tmp_path, train__max_steps=2, checkpoint={"push_to_hub": "me/model"})
    return tmp_path


@pytest.mark.usefixtures("folder")
def test_checkpoints_reach_a_hub_that_refuses_then_drops_then_accepts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with serve_hub({}, monkeypatch, listens=False) as hub:
        waits: list[float] = []

        def sleep(seconds: float) -> None:
            waits.append(seconds)
            if len(waits) == 1:
                hub.drops = 2  # the connection that finds out whether the hub is there, and the first request
                hub.listen()

        monkeypatch.setattr(object_store, "time", SimpleNamespace(sleep=sleep))
        assert main(["pretrain", "--config", "recipe.yaml", "--train.max_steps", "4"]) == 0
    assert len(waits) == 2
    output = capsys.readouterr()
    assert "step-00000002: uploading it to me/model on the hub failed" in output.out + output.err
    assert "me/model on the hub: 2 uploaded" in " ".join(output.out.replace("│", " ").split())
    assert {(request["organization"], request["name"], request["visibility"]) for request in hub.created} == {
        ("me", "model", "private")
    }
    assert [message for message, _ in hub.commits] == ["Step 2", "Step 4"]
    files = hub.commits[1][1]
    assert {"config.json", "model.safetensors", "model_config.yaml", "tokenizer.json"} <= files.keys()
    final = load_file("out/final/model.safetensors")
    last, first = (load(commit["model.safetensors"]) for _, commit in reversed(hub.commits))
    assert last.keys() == final.keys() and all(last[name].equal(final[name]) for name in final)
    assert not all(first[name].equal(final[name]) for name in final)
    assert not list(Path("out").glob("*.partial"))


def test_without_a_network_the_run_ends_as_it_would_and_says_what_is_missing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(object_store, "time", SimpleNamespace(sleep=lambda _seconds: None))
    with serve_hub({}, monkeypatch, listens=False):
        assert main(["pretrain", "--config", "recipe.yaml"]) == 0
    output = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "step-00000002: not uploaded to me/model on the hub" in output and "the hub cannot be reached" in output
    assert "me/model on the hub: 0 uploaded, 1 failed" in output
    assert len(read_losses(folder)) == 2 and Path("out/final/model.safetensors").is_file()


def test_an_adapter_is_uploaded_as_the_folder_that_the_run_ends_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(object_store, "FIRST_WAIT", 0)
    write_tiny_models(tmp_path, "base")
    Path("rows.json").write_text(
        '[{"instruction": "the fox", "output": "and the dog"}, {"instruction": "a", "output": "b"}]'
    )
    flags = ["--data", "JSON", "--data.json_path", "rows.json", "--data.val_split_fraction", "0.5"]
    flags += ["--train.max_steps", "1", "--train.global_batch_size", "1", "--train.lr_warmup_steps", "0"]
    with serve_hub({}, monkeypatch) as hub:
        assert main(["finetune_lora", "base", "--out_dir", "out", *flags, "--checkpoint.push_to_hub", "me/model"]) == 0
    ((message, files),) = hub.commits
    assert message == "Step 1"
    expected = load_file("out/adapter/adapter_model.safetensors")
    uploaded = load(files["adapter_model.safetensors"])
    assert uploaded.keys() == expected.keys() and all(uploaded[name].equal(expected[name]) for name in expected)
    assert files["adapter_config.json"] == Path("out/adapter/adapter_config.json").read_bytes()
    assert {path.name for path in Path("out/adapter").iterdir()} == files.keys()
