"""Weights published in 8 and 4 bits are dequantized as in transformers, and loaded under our names."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from litgpt.errors import UserError
from litgpt.model.gpt import GPT
from litgpt.store.dequantize import dequantize_fp8, dequantize_mxfp4
from litgpt.store.load_model import load_model
from litgpt.store.save_model import save_model_folder
from tests.store.models import random_model, small, weights


def fp8(weight: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """FP8 numbers and the scale of every block."""
    scale = torch.empty([-(-size // block) for size in weight.shape])
    numbers = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    for row in range(scale.shape[0]):
        for column in range(scale.shape[1]):
            index = slice(row * block, (row + 1) * block), slice(column * block, (column + 1) * block)
            scale[row, column] = weight[index].abs().max() / 448
            numbers[index] = (weight[index] / scale[row, column]).to(torch.float8_e4m3fn)
    return numbers, scale


def test_fp8_is_what_transformers_makes_of_it() -> None:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    numbers, scale = fp8(torch.randn(256, 384), 128)
    reference = Fp8Dequantize(None)._dequantize_one(numbers, scale, torch.bfloat16)
    assert torch.equal(dequantize_fp8(numbers, scale), reference)


def test_the_last_blocks_of_fp8_may_be_smaller() -> None:
    weight = torch.randn(20, 13, generator=torch.Generator().manual_seed(1))
    numbers, scale = fp8(weight, 8)
    assert scale.shape == (3, 2)
    assert (dequantize_fp8(numbers, scale, (8, 8)).float() - weight).abs().max() < 0.1
    with pytest.raises(UserError, match="scales for"):
        dequantize_fp8(numbers, scale[:2], (8, 8))


def test_mxfp4_is_what_transformers_makes_of_it() -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks = torch.randint(0, 256, (3, 10, 4, 16), dtype=torch.uint8)
    scales = torch.randint(100, 140, (3, 10, 4), dtype=torch.uint8)
    reference = convert_moe_packed_tensors(blocks, scales)
    assert reference.shape == (3, 128, 10)
    assert torch.equal(dequantize_mxfp4(blocks, scales), reference)
    with pytest.raises(UserError, match="scales for"):
        dequantize_mxfp4(blocks, scales[:, :5])
    with pytest.raises(UserError, match="uint8"):
        dequantize_mxfp4(blocks.float(), scales)


@pytest.fixture
def fp8_folder(tmp_path: Path) -> tuple[Path, GPT]:
    """A Llama whose matrices in blocks are FP8, in blocks of 16 x 16."""
    model = random_model(small("Llama-2-7b-hf"))
    save_model_folder(tmp_path / "model", config=model.config, tensors=weights(model))
    state = load_file(tmp_path / "model" / "model.safetensors")
    for name in [name for name in state if "_proj" in name]:
        state[name], state[f"{name}_scale_inv"] = fp8(state[name], 16)
    save_file(state, tmp_path / "model" / "model.safetensors")
    settings = tmp_path / "model" / "config.json"
    quantization = {"quant_method": "fp8", "weight_block_size": [16, 16]}
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "quantization_config": quantization}))
    return tmp_path / "model", model


def test_a_folder_of_fp8_loads_as_what_it_stands_for(fp8_folder: tuple[Path, GPT]) -> None:
    folder, model = fp8_folder
    loaded = GPT(model.config)
    load_model(loaded, folder)
    for (name, local), (_, was) in zip(loaded.named_parameters(), model.named_parameters(), strict=True):
        error = (local - was).abs().max() / was.abs().max()
        assert error < 0.05 and (error > 0) == (".attention." in name or ".mlp." in name), name


def test_converted_it_is_a_plain_folder(fp8_folder: tuple[Path, GPT]) -> None:
    from litgpt.store.convert import convert_folder

    folder, model = fp8_folder
    loaded, second = GPT(model.config), GPT(model.config)
    load_model(loaded, folder)
    convert_folder(folder, None, "float32")
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    assert {value.dtype for value in load_file(folder / "model.safetensors").values()} == {torch.float32}
    load_model(second, folder)
    assert all(torch.equal(value, other) for value, other in zip(loaded.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize("change", ["no scale", "few scales", "odd block"])
def test_damaged_fp8_has_one_line(fp8_folder: tuple[Path, GPT], change: str) -> None:
    folder, model = fp8_folder
    state = load_file(folder / "model.safetensors")
    scale = "model.layers.1.mlp.up_proj.weight_scale_inv"
    if change == "odd block":
        settings = json.loads((folder / "config.json").read_text())
        settings["quantization_config"]["weight_block_size"] = [0, "x"]
        (folder / "config.json").write_text(json.dumps(settings))
    else:
        taken = state.pop(scale)
        save_file(state if change == "no scale" else {**state, scale: taken[:1].clone()}, folder / "model.safetensors")
    with pytest.raises(UserError) as caught:
        load_model(GPT(model.config), folder)
    word = {"no scale": "up_proj.weight", "few scales": "scales for", "odd block": "weight_block_size"}[change]
    assert word in str(caught.value) and "\n" not in str(caught.value)
