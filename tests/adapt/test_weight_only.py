"""Weights in 8 and 4 bits without a package: every path computes the product with the dequantized weights."""

import pytest
import torch
from torch import Tensor

from litgpt.adapt.quantization import INFERENCE_KINDS, quantize_for_inference
from litgpt.adapt.weight_only import INT4_GROUP, Int4Linear, Int8Linear, WeightOnlyLinear
from tests.store.models import random_model, small


def dequantize_int8(layer: Int8Linear) -> Tensor:
    assert (layer.weight.dtype, layer.weight.shape, layer.scale.shape) == (torch.int8, (32, 96), (32,))
    return layer.weight.double() * layer.scale.double()[:, None]


def dequantize_int4(layer: Int4Linear) -> Tensor:
    assert (layer.codes.dtype, layer.codes.shape, layer.scales.shape) == (torch.uint8, (32, 48), (3, 32, 2))
    codes = torch.empty(32, 96, dtype=torch.float64)
    codes[:, ::2], codes[:, 1::2] = layer.codes % 16, layer.codes // 16
    scale, center = layer.scales.double().repeat_interleave(INT4_GROUP, 0).unbind(-1)
    return (codes - 8) * scale.T + center.T


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("build", "dequantize", "error"), [(Int8Linear, dequantize_int8, 1 / 127), (Int4Linear, dequantize_int4, 1 / 14)]
)
def test_every_path_multiplies_by_the_dequantized_weights(build, dequantize, error, dtype) -> None:
    torch.manual_seed(1)
    exact = torch.nn.Linear(96, 32, dtype=dtype)
    layer = build(exact)
    weight = dequantize(layer)
    assert 0 < (weight - exact.weight).abs().max() <= exact.weight.abs().max() * error
    x = torch.randn(layer.kernel_rows + 1, 96, dtype=dtype)
    expected = x.double() @ weight.T + exact.bias.double()
    tolerance = 0.02 if dtype == torch.bfloat16 else 1e-5
    for rows in (1, 5, len(x)):
        torch.testing.assert_close(layer(x[None, :rows])[0].double(), expected[:rows], atol=tolerance, rtol=tolerance)
    assert layer(x[:0]).shape == (0, 32)


@pytest.mark.parametrize("build", [Int8Linear, Int4Linear])
def test_sizes_without_a_kernel_are_multiplied_too(build) -> None:
    exact = torch.nn.Linear(41, 3)
    x = torch.randn(2, 41)
    torch.testing.assert_close(build(exact)(x), exact(x), atol=0.1, rtol=0)


@pytest.mark.parametrize(("kind", "error"), [("int8", 0.02), ("int4", 0.2)])
def test_quantized_models_are_close(kind: str, error: float) -> None:
    model = random_model(small("Qwen2.5-0.5B"))
    ids = torch.tensor([[7, 8, 9, 10, 11]])
    exact = model(ids)
    quantize_for_inference(model, kind, torch.device("cpu"))
    layers = [layer for layer in model.blocks.modules() if isinstance(layer, WeightOnlyLinear)]
    assert len(layers) == 7 * model.config.n_layer and {type(layer) for layer in layers} == {INFERENCE_KINDS[kind]}
    assert 0 < (model(ids) - exact).abs().mean() < error * exact.std()
