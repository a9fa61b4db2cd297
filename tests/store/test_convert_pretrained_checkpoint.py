"""`litgpt convert_pretrained_checkpoint`: training checkpoints of ours and of LitGPT become model folders."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import pytest
import torch
import yaml

from litgpt import cli
from litgpt.commands.convert_pretrained_checkpoint import run
from litgpt.errors import UserError
from litgpt.model.gpt import GPT
from litgpt.recipe.store_commands import ConvertPretrainedCheckpoint
from litgpt.store.checkpoint_save import Checkpoints
from tests.store.models import assert_loads, lit_state, random_model, small


def save_run(folder: Path, model: GPT, files: Mapping[str, str | Path] = MappingProxyType({})) -> Path:
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.arange(6)[None]).sum().backward()
    optimizer.step()
    checkpoints = Checkpoints(folder)
    files = {
        **files,
        "model_config.yaml": yaml.safe_dump(model.config.to_dict()),
        "tokenizer_config.json": "{}",
        "recipe.yaml": "seed: 1\n",
    }
    checkpoints.save(7, model, optimizer, {}, files)
    saved = checkpoints.commit()
    assert saved is not None
    return saved


@pytest.mark.parametrize("name", ["pythia-14m", "Gemma-2b"])
def test_a_step_or_the_latest_of_a_run_becomes_a_model_folder(tmp_path: Path, name: str) -> None:
    model = random_model(small(name))
    step = save_run(tmp_path / "run", model)
    run(ConvertPretrainedCheckpoint(step, tmp_path / "one"))
    (tmp_path / "two").mkdir()
    run(ConvertPretrainedCheckpoint(step.parent, tmp_path / "two"))
    for folder in (tmp_path / "one", tmp_path / "two"):
        assert_loads(folder, model)
        assert (folder / "config.json").exists() and (folder / "tokenizer_config.json").exists()
        assert not (folder / "progress.json").exists()


def test_a_used_output_folder_and_a_damaged_checkpoint_are_refused(tmp_path: Path) -> None:
    step = save_run(tmp_path / "run", random_model(small("pythia-14m")))
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match="not empty; choose another folder"):
        run(ConvertPretrainedCheckpoint(step, tmp_path / "used"))
    shard = next(step.glob("shard-*"))
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(UserError, match=shard.name):
        run(ConvertPretrainedCheckpoint(step, tmp_path / "new"))
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("as_file", [True, False])
def test_a_training_state_of_litgpt_becomes_a_model_folder(tmp_path: Path, as_file: bool) -> None:
    model = random_model(small("Llama-2-7b-hf"))
    source = tmp_path / "step-00000004"
    source.mkdir()
    state = {f"_orig_mod.{name}": tensor for name, tensor in lit_state(model).items()}
    torch.save({"model": state, "optimizer": {"state": {}}, "iter_num": 4, "step_count": 4}, source / "lit_model.pth")
    (source / "model_config.yaml").write_text(yaml.safe_dump(model.config.to_dict()))
    run(ConvertPretrainedCheckpoint(source / "lit_model.pth" if as_file else source, tmp_path / "clean"))
    assert_loads(tmp_path / "clean", model)


@pytest.mark.parametrize("command", ["convert_pretrained_checkpoint", "convert_from_litgpt", "convert_to_litgpt"])
def test_an_adapter_is_refused_with_the_command_that_merges_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    step = save_run(tmp_path / "run", random_model(small("pythia-14m")), {"adapter_config.json": "{}"})
    assert cli.main([command, str(step.parent), *([str(tmp_path / "new")] if "to" not in command else [])]) == 1
    assert f"holds an adapter; merge it: litgpt merge_lora {step}" in capsys.readouterr().err
