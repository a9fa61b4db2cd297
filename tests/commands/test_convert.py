"""convert_to_litgpt and convert_from_litgpt: what holds a model becomes a folder that loads, once it was checked."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from litgpt.cli import main
from litgpt.commands import convert_from_litgpt, convert_to_litgpt
from litgpt.errors import UserError
from litgpt.model.config import Config
from litgpt.model.gpt import GPT
from litgpt.recipe.store_commands import ConvertFromLitgpt, ConvertToLitgpt
from litgpt.store import convert, hub
from litgpt.store.checkpoint_save import Checkpoints
from litgpt.store.load_model import iter_tensors
from litgpt.store.save_model import save_model_folder
from tests.store.models import assert_loads, lit_state, random_model, small, weights


def to_litgpt(folder: Path, **settings: Any) -> None:
    convert_to_litgpt.run(ConvertToLitgpt(folder, **settings))


def hugging_face(folder: Path, model: GPT) -> Path:
    save_model_folder(folder, config=model.config, tensors=weights(model))
    (folder / "model_config.yaml").unlink()
    return folder


@pytest.mark.parametrize("form", ["bin", "raw", "model", "training", "checkpoint"])
def test_every_form_becomes_a_model_folder_in_place(tmp_path: Path, form: str) -> None:
    from transformers import AutoModelForCausalLM

    model = random_model(small("Llama-2-7b-hf"))
    folder = tmp_path / "m"
    if form == "bin":
        hugging_face(folder, model)
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    elif form == "checkpoint":
        checkpoints = Checkpoints(folder)
        files = {"model_config.yaml": yaml.safe_dump(model.config.to_dict())}
        checkpoints.save(3, model, None, {}, files)  # type: ignore[arg-type]
        folder = checkpoints.commit() or folder
    else:
        folder.mkdir()
        state: dict[str, Any] = dict(lit_state(model))
        state = state if form == "raw" else {"model": state}
        torch.save({**state, "iter_num": 3} if form == "training" else state, folder / "lit_model.pth")
        (folder / "model_config.yaml").write_text(yaml.safe_dump(model.config.to_dict()))
    (folder / "notes").mkdir()
    (folder / "notes" / "mine.txt").write_text("keep")
    before = {path.name for path in folder.iterdir()}
    to_litgpt(folder.parent if form == "checkpoint" else folder)
    assert before | {"model.safetensors", "config.json", "model_config.yaml"} <= {
        path.name for path in folder.iterdir()
    }
    assert (folder / "notes" / "mine.txt").read_text() == "keep"
    assert_loads(folder, model)
    reference = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.arange(9)[None]
    with torch.no_grad():
        assert (reference(ids).logits - model(ids)).abs().max() < 1e-4
    if form == "checkpoint":
        from litgpt.files import verify_manifest

        verify_manifest(folder)  # it can still be resumed from


def test_a_safetensors_folder_needs_no_new_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = random_model(small("Qwen2.5-0.5B"))
    folder = hugging_face(tmp_path / "m", model)
    before = (folder / "model.safetensors").stat()
    to_litgpt(folder, debug_mode=True)
    after = (folder / "model.safetensors").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    assert_loads(folder, model)
    said = capsys.readouterr().out.splitlines()
    assert "model.embed_tokens.weight -> embedding.weight (rename)" in said
    assert len(said) == 1 + len(load_file(folder / "model.safetensors"))


def test_a_cast_takes_the_place_of_the_shards_and_keeps_the_rest(tmp_path: Path) -> None:
    model = random_model(small("Llama-2-7b-hf"))
    folder = tmp_path / "m"
    save_model_folder(folder, config=model.config, tensors=weights(model), shard_bytes=20_000)
    hf_config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**hf_config, "_name_or_path": "kept"}))
    (folder / "README.md").write_text("mine")
    to_litgpt(folder, dtype="bfloat16")
    assert [path.name for path in folder.glob("*.safetensors*")] == ["model.safetensors"]
    assert {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()} == {torch.bfloat16}
    settings = json.loads((folder / "config.json").read_text())
    assert settings["torch_dtype"] == "bfloat16" and settings["_name_or_path"] == "kept"
    assert (folder / "README.md").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


@pytest.mark.parametrize("wrong", ["shape", "read back"])
def test_nothing_changes_unless_all_is_right(tmp_path: Path, wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(small("Llama-2-7b-hf"))
    folder = tmp_path / "m"
    folder.mkdir()
    shape = {**model.config.to_dict(), **({"n_layer": 3} if wrong == "shape" else {})}
    (folder / "model_config.yaml").write_text(yaml.safe_dump(shape))
    torch.save(lit_state(model), folder / "lit_model.pth")
    if wrong == "read back":
        write = convert.write_model

        def damaged(staged: Path, *arguments: Any, **settings: Any) -> Any:
            kept = write(staged, *arguments, **settings)
            state = load_file(staged / "model.safetensors")
            state["model.layers.1.mlp.up_proj.weight"][3, 4] += 1e-3
            save_file(state, staged / "model.safetensors")
            return kept

        monkeypatch.setattr(convert, "write_model", damaged)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(UserError, match=r"blocks\.2|blocks\.1\.mlp\.up\.weight: read back"):
        to_litgpt(folder)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    assert list(tmp_path.iterdir()) == [folder]


def test_a_folder_without_settings_is_of_the_model_it_is_named_after(tmp_path: Path) -> None:
    folder = tmp_path / "pythia-14m"
    folder.mkdir()
    assert convert.find_config(folder, None) == Config.from_name("pythia-14m")
    assert convert.find_config(folder, "Llama-3.2-1B") == Config.from_name("Llama-3.2-1B")
    with pytest.raises(UserError, match="no model_config"):
        convert.find_config(tmp_path, None)


def test_a_hugging_face_folder_is_written_cast_and_in_shards(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = random_model(small("Qwen3-0.6B"))
    source = hugging_face(tmp_path / "m", model)
    recipe = ConvertFromLitgpt(source, tmp_path / "out", dtype="bfloat16", max_shard_size=2e-5)
    convert_from_litgpt.run(recipe)
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    reference, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert reference.dtype == torch.bfloat16
    for name, tensor in iter_tensors(tmp_path / "out", model.config):
        assert torch.equal(tensor, weights(model)[name].bfloat16())
    with pytest.raises(UserError, match="not empty"):
        convert_from_litgpt.run(recipe)


@pytest.mark.parametrize("name", ["Llama-3.2-1B", "pythia-14m", "Gemma-2b"])
def test_litgpts_own_file_has_its_names_and_its_settings(tmp_path: Path, name: str) -> None:
    model = random_model(small(name))
    source = hugging_face(tmp_path / "m", model)
    (source / "model_config.yaml").write_text(yaml.safe_dump(model.config.to_dict()))
    convert_from_litgpt.run(ConvertFromLitgpt(source, tmp_path / "out", format="lit_model.pth"))
    state = torch.load(tmp_path / "out" / "lit_model.pth", weights_only=True)
    assert state.keys() == lit_state(model).keys() and all(
        torch.equal(state[key], lit_state(model)[key]) for key in state
    )
    hf_config = yaml.safe_load((tmp_path / "out" / "model_config.yaml").read_text())
    assert "tie_embeddings" not in hf_config and hf_config["norm_class_name"] in ("RMSNorm", "LayerNorm")
    assert_loads(tmp_path / "out", model)


def test_what_litgpt_cannot_say_is_refused_by_name(tmp_path: Path) -> None:
    nameless = Config(**{**small("Gemma-2b").to_dict(), "name": "mine"})  # LitGPT tells a Gemma's norm by its name
    model = random_model(nameless)
    source = hugging_face(tmp_path / "m", model)
    with pytest.raises(UserError, match="norm_class_name"):
        convert_from_litgpt.run(ConvertFromLitgpt(source, tmp_path / "out", format="lit_model.pth"))
    assert not (tmp_path / "out").exists()


def test_one_file_with_published_names(tmp_path: Path) -> None:
    model = random_model(small("Qwen2.5-0.5B"))
    source = hugging_face(tmp_path / "m", model)
    convert_from_litgpt.run(ConvertFromLitgpt(source, tmp_path / "out", format="model.pth"))
    state = torch.load(tmp_path / "out" / "model.pth", weights_only=True)
    expected = load_file(source / "model.safetensors")
    assert state.keys() == expected.keys() and all(torch.equal(state[key], expected[key]) for key in state)


def test_a_folder_is_uploaded_where_it_is_asked_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    model = random_model(small("Llama-2-7b-hf"))
    source, done = hugging_face(tmp_path / "m", model), []

    class Hub:
        def __init__(self, token: str | None) -> None:
            done.append(token)

        def create_repo(self, repo_id: str, **settings: Any) -> None:
            done.append((repo_id, settings))

        def upload_folder(self, repo_id: str, folder_path: Path, commit_message: str | None) -> str:
            assert commit_message is None
            done.append((repo_id, sorted(path.name for path in Path(folder_path).iterdir())))
            return "https://hub/me/model"

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(hub, "check_hub_connection", lambda: None)
    recipe = ConvertFromLitgpt(source, tmp_path / "out", push_to_hub="me/model", access_token="secret")
    convert_from_litgpt.run(recipe)
    assert done[0] == "secret" and done[1] == ("me/model", {"private": True, "exist_ok": True})
    assert {"config.json", "model.safetensors"} <= set(done[2][1])
    assert "secret" not in repr(recipe)
    with pytest.raises(UserError, match="push_to_hub: 'model' is not org/name"):
        convert_from_litgpt.run(ConvertFromLitgpt(source, tmp_path / "other", push_to_hub="model"))
    assert not (tmp_path / "other").exists()
    monkeypatch.setattr(Hub, "create_repo", lambda *_, **__: (_ for _ in ()).throw(ConnectionError("no route, secret")))
    with pytest.raises(UserError, match="cannot be reached") as caught:
        hub.upload(tmp_path / "out", "me/model", access_token="secret")
    assert "secret" not in str(caught.value)


def test_litgpts_command_lines_are_understood(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = random_model(small("Llama-2-7b-hf"))
    folder = str(hugging_face(tmp_path / "m", model))
    for line in (
        ["convert_to_litgpt", folder, "--dtype", "float32", "--debug_mode", "true"],
        ["convert_from_litgpt", folder, str(tmp_path / "out")],
        ["convert_pretrained_checkpoint", folder, str(tmp_path / "clean")],
    ):
        assert main(line) == 0, capsys.readouterr().err
    assert_loads(tmp_path / "out", model)
    assert_loads(tmp_path / "clean", model)
    assert main(["convert_to_litgpt", str(tmp_path / "nothing")]) == 1
    assert main(["convert_from_litgpt", folder]) == 2
