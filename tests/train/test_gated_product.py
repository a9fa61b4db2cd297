"""Feed-forward layers that compute their product again against those that save it."""

from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from litgpt.model.config import Config
from litgpt.model.gpt import GPT
from litgpt.model.layers import GatedMLP
from litgpt.train.gated_product import recompute_products

CONFIG = Config(
    name="gated",
    n_layer=1,
    n_embd=16,
    n_head=2,
    block_size=32,
    padded_vocab_size=64,
    mlp_class_name="LLaMAMLP",
    intermediate_size=40,
    bias=False,
)


def keep(saved: list[Tensor], tensor: Tensor) -> Tensor:
    """Add a tensor that is saved to a list."""
    saved.append(tensor)
    return tensor


def build_layer(config: Config = CONFIG) -> tuple[GPT, GatedMLP]:
    torch.manual_seed(0)
    model = GPT(config)
    layer = model.blocks[0].mlp
    assert isinstance(layer, GatedMLP)
    return model, layer


def compute(layer: GatedMLP, *, autocast: bool) -> tuple[list[Tensor], int]:
    """Outputs and gradients, and how many tensors as large as the product are saved."""
    x = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(1)).requires_grad_()
    saved: list[Tensor] = []
    hooks = saved_tensors_hooks(partial(keep, saved), lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = layer(x)
    trained = [x, *(parameter for parameter in layer.parameters() if parameter.requires_grad)]
    gradients = torch.autograd.grad(y.float().square().sum(), trained)
    return [y, *gradients], sum(tensor.numel() == 3 * 5 * 40 for tensor in saved)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_values_are_the_same_and_the_product_is_not_saved(autocast: bool, frozen: bool) -> None:
    model, layer = build_layer()
    layer.down.weight.requires_grad_(not frozen)
    expected, saved = compute(layer, autocast=autocast)
    recompute_products(model)
    results, saved_less = compute(layer, autocast=autocast)
    assert all(map(torch.equal, results, expected))
    assert saved_less == 2 and saved >= 2 + (not frozen)


class OtherLinear(nn.Linear):
    """A layer as of an adapter."""


def test_layers_that_differ_stay_as_they_are() -> None:
    model, layer = build_layer(Config(**{**CONFIG.to_dict(), "bias": True}))
    recompute_products(model)
    assert "forward" not in vars(layer)
    model, layer = build_layer()
    layer.down.__class__ = OtherLinear
    recompute_products(model)
    assert "forward" not in vars(layer)
    model, layer = build_layer(Config(**{**CONFIG.to_dict(), "mlp_class_name": "GemmaMLP"}))
    recompute_products(model)
    assert "forward" not in vars(layer)


def test_hooks_of_the_last_layer_are_called() -> None:
    model, layer = build_layer()
    expected, _ = compute(layer, autocast=False)
    recompute_products(model)
    seen: list[Tensor] = []
    for add in (layer.down.register_forward_hook, layer.down.register_forward_pre_hook):
        handle = add(lambda _, inputs, *_output: seen.append(inputs[0]))
        results, _ = compute(layer, autocast=False)
        assert len(seen) == 1 and seen.pop().shape == (3, 5, 40)
        assert all(map(torch.equal, results, expected))
        handle.remove()
