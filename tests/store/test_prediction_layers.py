"""Prediction layers of DeepSeek V3 and GLM 4.5 folders: read and written to the bit, or left out and said."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from litgpt.errors import UserError
from litgpt.model.config import Config
from litgpt.model.gpt import GPT
from litgpt.store.config_overrides import override_config
from litgpt.store.load_model import iter_tensors, load_config, load_model
from litgpt.store.save_model import save_model_folder
from litgpt.store.tensor_audit import audit_folder, find_differing
from tests.layouts.layouts import SHAPES
from tests.store.models import random_model, small, weights

GLM = small(
    "GLM-4.5", n_expert=4, n_expert_per_token=2, moe_intermediate_size=16, first_k_dense_replace=1,
    n_prediction_layers=2, attn_bias=True,
)  # fmt: skip
CONFIGS = {"deepseek": SHAPES["predictions"], "glm": GLM}
OWN = [
    *("enorm", "hnorm", "eh_proj", "shared_head.norm", "embed_tokens", "shared_head.head"),
    *("input_layernorm", "self_attn.o_proj", "mlp.gate", "mlp.experts.3.down_proj", "mlp.shared_experts.up_proj"),
]


def publish(folder: Path, config: Config) -> dict[str, Tensor]:
    """Write a folder under its published names; its tensors."""
    model = random_model(config)
    save_model_folder(folder, config=config, tensors=weights(model), dtype=torch.bfloat16)
    return load_file(folder / "model.safetensors")


def change(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Write other tensors into a folder, which then has only the files of transformers."""
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "model_config.yaml").unlink(missing_ok=True)


@pytest.mark.parametrize("name", CONFIGS)
def test_in_and_out_to_the_bit(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = publish(tmp_path / "model", CONFIGS[name])
    names = {f"model.layers.{layer}.{own}.weight" for layer in (2, 3) for own in OWN}
    assert names <= tensors.keys()
    assert torch.equal(tensors["model.layers.3.embed_tokens.weight"], tensors["model.embed_tokens.weight"])
    assert torch.equal(tensors["model.layers.2.shared_head.head.weight"], tensors["lm_head.weight"])
    assert json.loads((tmp_path / "model/config.json").read_text())["num_nextn_predict_layers"] == 2
    (tmp_path / "model/model_config.yaml").unlink()
    config = load_config(tmp_path / "model")
    assert config.n_prediction_layers == 2
    save_model_folder(tmp_path / "again", config=config, tensors=iter_tensors(tmp_path / "model", config))
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[key], tensors[key]) for key in tensors)
    assert find_differing(audit_folder(tmp_path / "model", config), config) == []
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", CONFIGS)
def test_a_folder_without_their_weights_is_loaded_without_them(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = publish(tmp_path, CONFIGS[name])  # transformers does not write those of further layers
    kept = {key: tensor for key, tensor in tensors.items() if ".layers.2." not in key and ".layers.3." not in key}
    change(tmp_path, kept)
    config = load_config(tmp_path)
    load_model(GPT(config), tmp_path)
    assert config.n_prediction_layers == 0
    assert "has no weights of the 2 prediction layers that config.json lists; loaded without" in capsys.readouterr().err


def test_layers_that_are_incomplete_are_an_error(tmp_path: Path) -> None:
    tensors = publish(tmp_path, GLM)
    del tensors["model.layers.3.eh_proj.weight"]
    change(tmp_path, tensors)
    with pytest.raises(UserError, match=r"lacks blocks\.3\.projection\.weight"):
        load_model(GPT(GLM), tmp_path)


def test_repeated_tensors_may_be_missing_but_not_different(tmp_path: Path) -> None:
    tensors = publish(tmp_path, GLM)
    del tensors["model.layers.3.embed_tokens.weight"], tensors["model.layers.2.shared_head.head.weight"]
    change(tmp_path, tensors)
    load_model(GPT(GLM), tmp_path)
    tensors["model.layers.2.embed_tokens.weight"] = tensors["model.layers.2.embed_tokens.weight"] + 1
    change(tmp_path, tensors)
    message = (
        r"model\.layers\.2\.embed_tokens\.weight differs from the model's embedding\.weight, but prediction layers "
        r"share it; set model_config\.n_prediction_layers: 0 to leave them out"
    )
    with pytest.raises(UserError, match=message):
        load_model(GPT(GLM), tmp_path)
    load_model(GPT(override_config(GLM, {"n_prediction_layers": 0})), tmp_path)


def test_left_out_by_choice_they_are_named(tmp_path: Path) -> None:
    publish(tmp_path, GLM)
    config = override_config(load_config(tmp_path), {"n_prediction_layers": 1})
    lines: list[str] = []
    load_model(GPT(config), tmp_path, warn=lines.append)
    (line,) = lines
    assert "tensors of parts that the model does not have, such as model.layers.3." in line
    with pytest.raises(UserError, match=r"model_config\.n_prediction_layers: 3 changes blocks\.4\."):
        override_config(load_config(tmp_path), {"n_prediction_layers": 3})


def test_a_shape_without_a_published_form_keeps_our_names(tmp_path: Path) -> None:
    config = small("Llama-3.2-1B", n_prediction_layers=1)
    model = random_model(config)
    lines: list[str] = []
    save_model_folder(tmp_path / "model", config=config, tensors=weights(model), warn=lines.append)
    assert "no published architecture has this shape" in lines[0]
    loaded: dict[str, Any] = dict(iter_tensors(tmp_path / "model", load_config(tmp_path / "model")))
    assert all(torch.equal(loaded[key], tensor) for key, tensor in weights(model).items())
