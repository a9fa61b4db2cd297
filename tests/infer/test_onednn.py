"""Products by oneDNN in inference: equal up to rounding, of the weights as they are, and not in training."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from litgpt.infer.engine import Engine
from litgpt.infer.onednn import ReorderedForward, reorder_linear_layers
from litgpt.infer.requests import Request
from litgpt.infer.sampling import Sampling
from tests.model.test_attention import small


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_equal_those_of_torch(dtype: torch.dtype) -> None:
    model = small().to(dtype)
    layer = model.blocks[0].attention.q
    assert isinstance(layer, nn.Linear)
    reorder_linear_layers(model)
    reorder_linear_layers(model)
    forward = layer.__dict__["forward"]
    assert isinstance(forward, ReorderedForward) and not isinstance(forward.forward, ReorderedForward)
    x = torch.randn(1, 7, layer.in_features, dtype=dtype)
    for _ in range(2):
        with torch.inference_mode():
            torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))
        assert forward.matrix.matrix is not None
        with torch.no_grad():
            layer.weight.mul_(2)  # the next product is with the new weight
    assert layer(x.requires_grad_()).requires_grad
    other = copy.deepcopy(layer)
    with torch.inference_mode():
        other.weight.zero_()
        assert torch.equal(other(x), F.linear(x, other.weight, other.bias)) and not torch.equal(other(x), layer(x))


@pytest.mark.parametrize("bias", [False, True])
def test_one_row_in_bfloat16_is_multiplied_without_a_copy_of_the_weights(bias: bool) -> None:
    model = small(bias=bias).bfloat16()
    reorder_linear_layers(model)
    block, x = model.blocks[0], torch.randn(1, 1, model.config.n_embd).bfloat16()
    down = block.mlp.down
    hidden = torch.randn(1, 1, down.in_features).bfloat16()
    with torch.inference_mode():
        torch.testing.assert_close(down(hidden), F.linear(hidden, down.weight, down.bias))
        for module, names in ((block.attention, ("q", "k", "v")), (block.mlp, ("gate", "up"))):
            for output, layer in zip(module.project(x), (getattr(module, name) for name in names), strict=True):
                torch.testing.assert_close(output, F.linear(x, layer.weight, layer.bias))
            assert module.__dict__["project"].matrix.matrix is None
        assert down.__dict__["forward"].matrix.matrix is None
        assert torch.backends.mkldnn.enabled
        two = hidden.expand(1, 2, -1).contiguous()
        torch.testing.assert_close(down(two)[:, :1], down(hidden))
        assert down.__dict__["forward"].matrix.matrix is not None


@pytest.mark.parametrize("bias", [False, True])
def test_projections_of_one_input_are_one_product_unless_one_is_modified(bias: bool) -> None:
    model = small(bias=bias)
    reorder_linear_layers(model)
    block = model.blocks[0]
    x = torch.randn(1, 5, model.config.n_embd)
    with torch.inference_mode():
        for module, layers in ((block.attention, ("q", "k", "v")), (block.mlp, ("gate", "up"))):
            outputs = module.project(x)
            assert len({output.untyped_storage().data_ptr() for output in outputs}) == 1
            for output, name in zip(outputs, layers, strict=True):
                layer = getattr(module, name)
                torch.testing.assert_close(output, F.linear(x, layer.weight, layer.bias))
        block.mlp.up.register_forward_hook(lambda _layer, _inputs, output: output + 1)
        reorder_linear_layers(model)
        assert not isinstance(block.mlp.up.forward.forward, ReorderedForward)
        torch.testing.assert_close(block.mlp.project(x)[1], F.linear(x, block.mlp.up.weight, block.mlp.up.bias) + 1)
    assert block.attention.project(x)[0].requires_grad


def test_an_engine_continues_with_the_weights_of_a_training_step() -> None:
    model, request = small(), Request(tuple(range(5, 30)), 8, Sampling(0))
    engine = Engine(model)
    before = [token.token for token in engine.run([request])[0].tokens]
    optimizer = torch.optim.SGD(model.parameters(), lr=3.0)
    model(torch.arange(5, 30)[None]).square().mean().backward()
    optimizer.step()
    after = [token.token for token in engine.run([request])[0].tokens]
    assert after != before
    assert after == [token.token for token in Engine(model, reorder=False).run([request])[0].tokens]


def test_double_precision_and_autocast_are_computed_by_torch() -> None:
    for dtype, is_mixed in ((torch.float64, False), (torch.float32, True)):
        model = small().to(dtype)
        reorder_linear_layers(model)
        layer = model.blocks[0].attention.q
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=is_mixed):
            output = layer(torch.randn(1, 3, layer.in_features, dtype=dtype))
        assert output.dtype == (torch.bfloat16 if is_mixed else torch.float64)
        assert is_mixed is False or layer.__dict__["forward"].matrix.matrix is None
