"""Weights in 8 bits without a package: every path computes the product with the dequantized weights."""

import torch

from litgpt.adapt.quantization import quantize_for_inference
from litgpt.adapt.weight_only import Int8Linear
from tests.store.models import random_model, small


def test_int8_weights_are_multiplied_by_every_path_alike() -> None:
    torch.manual_seed(1)
    exact = torch.nn.Linear(48, 24, dtype=torch.bfloat16)
    layer = Int8Linear(exact)
    assert (layer.weight.dtype, layer.weight.shape, layer.scale.shape) == (torch.int8, (24, 48), (24,))
    dequantized = layer.weight.double() * layer.scale.double()[:, None]
    assert 0 < (dequantized - exact.weight).abs().max() <= exact.weight.abs().max() / 127
    x = torch.randn(6, 48)
    expected = x.double() @ dequantized.T + exact.bias.double()
    for rows, dtype, tolerance in ((1, torch.bfloat16, 0.02), (6, torch.bfloat16, 0.02), (6, torch.float32, 1e-5)):
        y = layer.to(dtype)(x[None, :rows].to(dtype))
        torch.testing.assert_close(y[0].double(), expected[:rows], atol=tolerance, rtol=tolerance)
    assert Int8Linear(torch.nn.Linear(7, 3, dtype=torch.bfloat16))(x[:2, :7].bfloat16()).shape == (2, 3)


def test_int8_models_are_close() -> None:
    model = random_model(small("Qwen2.5-0.5B"))
    ids = torch.tensor([[7, 8, 9, 10, 11]])
    exact = model(ids)
    quantize_for_inference(model, "int8", torch.device("cpu"))
    assert sum(isinstance(layer, Int8Linear) for layer in model.blocks.modules()) == 7 * model.config.n_layer
    assert 0 < (model(ids) - exact).abs().mean() < 0.02 * exact.std()
