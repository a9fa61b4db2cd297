"""A quantized base computes as its dequantized weights, trains adapters, and is never in memory as a whole."""

from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from torch import Tensor

from litgpt import adapt
from litgpt.adapt import layers, quantization
from litgpt.adapt.quantization import QUANT_FORMATS, QuantFormat, QuantizedLinear
from litgpt.errors import UserError
from litgpt.model.gpt import GPT
from litgpt.recipe.tuner import BOFT, IA3, Bone, FourierFT, LoRA, Tuner, VeRA
from litgpt.store.load_model import iter_tensors
from litgpt.store.save_model import save_model_folder
from tests.adapt.models import IDS, build_merged, compute_loss, copy_base, perturb, train_steps
from tests.store.models import random_model, small

SHAPE: dict[str, Any] = {"n_embd": 64, "intermediate_size": 96, "head_size": 16, "padded_vocab_size": 80}
BYTES = {
    "bnb.nf4": 0.57,
    "bnb.nf4-dq": 0.516,
    "bnb.fp4": 0.57,
    "bnb.fp4-dq": 0.516,
    "bnb.int8-training": 1.02,
    "torchao.nf4": 0.516,
}


def build_quantized(kind: str, settings: Tuner, folder: Path, dtype: torch.dtype = torch.float32) -> GPT:
    """A random model in a folder, loaded as in a run: built on meta, quantized as it is read."""
    config = small("Qwen2.5-0.5B", tie_embeddings=False, **SHAPE)
    if not folder.exists():
        save_model_folder(folder, config=config, tensors=dict(random_model(config).named_parameters()))
    with torch.device("meta"):
        model = GPT(config).to(dtype)
    quantization.quantize(model, kind)
    adapt.attach(model, settings)
    model.to_empty(device="cpu")
    quantization.load_quantized(model, iter_tensors(folder, config))
    adapt.initialize_adapter(model, settings, 0)
    return model


def build_dequantized(model: GPT, settings: Tuner) -> GPT:
    """The same model with the dequantized weights."""
    other = GPT(model.config).to(next(model.parameters()).dtype)
    with torch.no_grad():
        for name, value in other.named_parameters():
            owner, _, key = name.rpartition(".")
            value.copy_(layers.get_base_value(model.get_submodule(owner), key))
    adapt.attach(other, settings)
    adapt.initialize_adapter(other, settings, 0)
    return other


@pytest.mark.parametrize("kind", QUANT_FORMATS)
def test_a_quantized_matrix_is_close_and_small(kind: str) -> None:
    quant_format: QuantFormat = QUANT_FORMATS[kind]
    weight = torch.randn(512, 384, generator=torch.Generator().manual_seed(0))
    quant_tensors = quant_format.quantize(weight)
    assert {name: tensor.numel() for name, tensor in quant_tensors.items()} == quant_format.sizes((512, 384))
    assert all(tensor.dtype == torch.uint8 and tensor.dim() == 1 for tensor in quant_tensors.values())
    back = quant_format.dequantize(quant_tensors, (512, 384), torch.float32)
    error = (back - weight).norm() / weight.norm()
    assert 1e-4 < error < (0.01 if "int8" in kind else 0.14 if "fp4" in kind else 0.1)
    assert sum(tensor.numel() for tensor in quant_tensors.values()) / weight.numel() < BYTES[kind]


@pytest.mark.parametrize("kind", [kind for kind in QUANT_FORMATS if kind.startswith("bnb") and "int8" not in kind])
@pytest.mark.parametrize("shape", [(48, 64), (5, 30)])
def test_four_bits_equal_bitsandbytes_to_the_bit(kind: str, shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    layer = bitsandbytes.nn.Linear4bit(
        shape[1],
        shape[0],
        bias=False,
        quant_type=kind[4:7],
        compress_statistics=kind.endswith("dq"),
        compute_dtype=torch.float32,
    )
    layer.weight.data.copy_(weight)
    layer.to("cpu")
    expected = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    dequantized = QUANT_FORMATS[kind].dequantize(QUANT_FORMATS[kind].quantize(weight), shape, torch.float32)
    assert torch.equal(dequantized, expected)
    assert torch.equal(
        QUANT_FORMATS[kind].dequantize(QUANT_FORMATS[kind].quantize(weight), shape, torch.bfloat16), expected.bfloat16()
    ) or kind.endswith("dq")


def test_torchao_is_dequantized_to_the_bit() -> None:
    from torchao.quantization import to_nf4

    weight = torch.randn(256, 128)
    quant_format = QUANT_FORMATS["torchao.nf4"]
    assert torch.equal(
        quant_format.dequantize(quant_format.quantize(weight), (256, 128), torch.float32),
        to_nf4(weight).get_original_weight(),
    )


@pytest.mark.parametrize("kind", QUANT_FORMATS)
def test_lora_trains_as_with_the_dequantized_weights(kind: str, tmp_path: Path) -> None:
    settings = LoRA(r=4, dropout=0.0)
    model = build_quantized(kind, settings, tmp_path / "base")
    other = build_dequantized(model, settings)
    base = {name: value.clone() for name, value in model.named_parameters() if not value.requires_grad}
    assert sum(isinstance(layer, QuantizedLinear) for layer in model.modules()) == 14
    perturb(model)
    perturb(other)
    assert (model(IDS) - other(IDS)).abs().max() < 1e-5
    losses, expected_losses = (train_steps(m, lambda m=m: m(IDS), 3) for m in (model, other))
    assert losses == pytest.approx(expected_losses, abs=1e-6) and losses[-1] < losses[0]
    for (name, value), expected in zip(
        adapt.get_adapter_parameters(model).items(), adapt.get_adapter_parameters(other).values(), strict=True
    ):
        assert torch.allclose(value, expected, atol=1e-5), name
    now = dict(model.named_parameters())
    assert all(torch.equal(now[name], value) for name, value in base.items())
    assert (build_merged(other)(IDS) - merged_plain(model)(IDS)).abs().max() < 1e-4


def merged_plain(model: GPT) -> GPT:
    merged = GPT(model.config)
    merged.load_state_dict(dict(adapt.merge_adapter(model)))
    return merged


@pytest.mark.parametrize(
    "settings",
    [
        *(LoRA(dora=True, dropout=0.0), LoRA(init="pissa", dropout=0.0), IA3(), VeRA(r=4), BOFT()),
        *(FourierFT(n_frequency=50), Bone(r=5), Bone(r=16, variant="bat")),
    ],
    ids=str,
)
def test_other_tuners_support_a_quantized_base(settings: Tuner, tmp_path: Path) -> None:
    model = build_quantized("bnb.nf4", settings, tmp_path / "base")
    other = build_dequantized(model, settings)
    perturb(model)
    perturb(other)
    assert (model(IDS) - other(IDS)).abs().max() < 1e-4
    assert (merged_plain(model)(IDS) - model(IDS)).abs().max() < 1e-4
    with layers.disable_adapters(model), layers.disable_adapters(other):
        assert (model(IDS) - other(IDS)).abs().max() < 1e-4


def test_no_dequantized_weight_is_saved_for_backward(tmp_path: Path) -> None:
    model = build_quantized("bnb.nf4", LoRA(r=4, dropout=0.0), tmp_path / "base")
    kept: list[tuple[int, ...]] = []

    def keep(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point():
            kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        compute_loss(model(IDS)).backward()
    shapes = {
        (layer.out_features, layer.in_features) for layer in model.modules() if isinstance(layer, QuantizedLinear)
    }
    assert kept and not {shape for shape in kept if shape in shapes or shape[::-1] in shapes}


def test_loading_holds_one_weight_at_a_time(tmp_path: Path) -> None:
    held: list[int] = []
    model = build_quantized("bnb.nf4", LoRA(), tmp_path / "base")
    before = copy_base(model)

    def write(parameter: torch.nn.Parameter, value: Tensor) -> None:
        held.append(value.numel() * value.element_size())
        parameter.copy_(value)

    quantization.load_quantized(model, iter_tensors(tmp_path / "base", model.config), write=write)
    assert max(held) == 80 * 64 * 4  # the embedding; every quantized tensor is smaller
    assert all(torch.equal(value, before[name]) for name, value in copy_base(model).items())


def test_bfloat16_and_autocast(tmp_path: Path) -> None:
    settings = LoRA(r=4, dropout=0.0)
    exact = build_quantized("bnb.nf4", settings, tmp_path / "base")(IDS)
    true = build_quantized("bnb.nf4", settings, tmp_path / "base", torch.bfloat16)
    assert {value.dtype for value in adapt.get_adapter_parameters(true).values()} == {torch.float32}
    scores = true(IDS)
    compute_loss(scores.float()).backward()
    assert scores.dtype == torch.bfloat16 and (scores - exact).abs().max() < 0.1 * exact.abs().max()
    mixed = build_quantized("bnb.nf4", settings, tmp_path / "base")
    with torch.autocast("cpu", torch.bfloat16):
        scores = mixed(IDS)
    assert scores.dtype == torch.bfloat16 and (scores - exact).abs().max() < 0.1 * exact.abs().max()
    compute_loss(scores.float()).backward()
    assert all(
        value.grad is not None and value.grad.any()
        for name, value in adapt.get_adapter_parameters(mixed).items()
        if name.endswith("b")
    )


@pytest.mark.parametrize(
    ("kind", "name", "message"),
    [
        ("nf4", "Qwen2.5-0.5B", "quantize: 'nf4' is not known; set bnb.nf4, bnb.nf4-dq"),
        ("bnb.nf4", "Mixtral-8x7B-v0.1", "quantize: bnb.nf4 is not supported with experts, .*; set null"),
    ],
)
def test_unsupported_formats_and_models_are_one_line(kind: str, name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        quantization.quantize(GPT(small(name)), kind)


def test_a_missing_package_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantization, "find_spec", lambda _name: None)
    with pytest.raises(UserError, match="needs bitsandbytes, which is not installed: pip install"):
        quantization.quantize(GPT(small("Qwen2.5-0.5B")), "bnb.nf4")
    quantization.quantize(GPT(small("Qwen2.5-0.5B")), "bnb.int8-training")
