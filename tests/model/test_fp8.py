"""Products in FP8 are close to exact ones, for every recipe, and equal to brute force where they are our own."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from litgpt.model import fp8
from litgpt.model.fp8 import FP8_BLOCK, EmulatedBlockwiseProduct, build_product, is_emulated, multiply_groups, use_fp8
from litgpt.model.gpt import GPT
from litgpt.model.init import initialize
from litgpt.model.moe import grouped_linear
from litgpt.parallel.fp8 import apply_fp8
from litgpt.recipe.fp8 import FP8Args
from litgpt.recipe.parallel import ParallelDims
from tests.store.models import small

pytest.importorskip("torchao")
CPU = torch.device("cpu")
DEFAULTS = [FP8Args(recipe=name) for name in ("tensorwise", "rowwise", "blockwise", "mxfp8", "delayed")]
RECIPES = [*DEFAULTS, FP8Args(recipe="rowwise", format="hybrid"), FP8Args(recipe="delayed", format="e4m3")]
WIDTHS = {"n_embd": 128, "n_head": 4, "n_query_groups": 4, "head_size": 32}
DENSE = small("Llama-3.2-1B", **WIDTHS, n_layer=2, intermediate_size=256, tie_embeddings=False)
EXPERTS = small("Qwen3-30B-A3B", **WIDTHS, n_layer=1, n_expert=4, n_expert_per_token=2, moe_intermediate_size=128)


def decibels(value: Tensor, exact: Tensor) -> float:
    """The ratio of signal to noise."""
    return 10 * torch.log10(exact.square().sum() / (value.float() - exact).square().sum()).item()


def cosine(values: list[Tensor], exact: list[Tensor]) -> float:
    """The cosine of two gradients."""
    flat = [torch.cat([tensor.double().flatten() for tensor in tensors]) for tensors in (values, exact)]
    return F.cosine_similarity(*flat, dim=0).item()


def build(config: Any, settings: FP8Args) -> GPT:
    with torch.device("meta"):
        model = GPT(config)
    apply_fp8(model, settings, ParallelDims(), CPU)
    model.to_empty(device="cpu")
    initialize(model, 1)
    return model


def measure(model: nn.Module, *inputs: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The output, and the gradients of a weighted sum of it."""
    y = model(*inputs)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
    return y.detach(), list(torch.autograd.grad((y.float() * weights).sum(), list(model.parameters())))


@pytest.mark.parametrize("settings", DEFAULTS, ids=lambda settings: settings.recipe)
def test_a_model_is_close_to_an_exact_one(settings: FP8Args) -> None:
    ids = torch.randint(0, 50, (2, 19), generator=torch.Generator().manual_seed(1))
    (y, grads), (exact, exact_grads) = (measure(build(DENSE, choice), ids) for choice in (settings, FP8Args()))
    assert 20 < decibels(y, exact) < 50
    assert 0.99 < cosine(grads, exact_grads) < 0.99999


@pytest.mark.parametrize("settings", RECIPES, ids=lambda settings: f"{settings.recipe} {settings.resolved_format}")
def test_experts_are_close_to_exact_ones(settings: FP8Args) -> None:
    x = torch.randn(37, 128, generator=torch.Generator().manual_seed(1))
    ends = torch.tensor([20, 20, 21, 37], dtype=torch.int32)  # one without rows, one with a single one
    experts, exact = (build(EXPERTS, choice).blocks[0].experts for choice in (settings, FP8Args()))
    assert experts is not None and exact is not None
    (y, grads), (exact_y, exact_grads) = measure(experts, x, ends), measure(exact, x, ends)
    assert 20 < decibels(y, exact_y) < 50
    assert 0.99 < cosine(grads, exact_grads) < 0.99999


def test_only_the_layers_of_blocks_are_changed() -> None:
    model = build(EXPERTS, DEFAULTS[0])
    changed = {name for name, module in model.named_modules() if hasattr(module, "fp8_unit")}
    assert changed == {
        f"blocks.0.{name}" for name in ("mlp.experts", *(f"attention.{n}" for n in ("q", "k", "v", "out")))
    }
    assert list(model.state_dict()) == list(build(EXPERTS, FP8Args()).state_dict())


def round_blocks(x: Tensor, rows: int, columns: int) -> Tensor:
    """Every block rounded to e4m3 with a scale of its own."""
    rounded = torch.empty_like(x)
    for row in range(0, x.shape[0], rows):
        for column in range(0, x.shape[1], columns):
            block = x[row : row + rows, column : column + columns]
            scale = block.abs().max() / 448
            rounded[row : row + rows, column : column + columns] = (block / scale).to(
                torch.float8_e4m3fn
            ).float() * scale
    return rounded


def test_blockwise_is_that_of_deepseek() -> None:
    draw = torch.Generator().manual_seed(3)
    x, weight, grad = (
        torch.randn(*shape, generator=draw) for shape in ((FP8_BLOCK, 256), (384, 256), (FP8_BLOCK, 384))
    )
    inputs = x.requires_grad_(), weight.requires_grad_()
    y = EmulatedBlockwiseProduct.apply(*inputs)
    grad_x, grad_weight = torch.autograd.grad(y, inputs, grad)
    x, weight = x.detach(), weight.detach()
    torch.testing.assert_close(y.detach(), round_blocks(x, 1, FP8_BLOCK) @ round_blocks(weight, FP8_BLOCK, FP8_BLOCK).T)
    torch.testing.assert_close(grad_x, round_blocks(grad, 1, FP8_BLOCK) @ round_blocks(weight, FP8_BLOCK, FP8_BLOCK))
    torch.testing.assert_close(grad_weight, round_blocks(grad, FP8_BLOCK, 1).T @ round_blocks(x, FP8_BLOCK, 1))


def test_autocast_computes_as_casting_does() -> None:
    layer = nn.Linear(32, 48)
    use_fp8(layer, {"weight": build_product("rowwise", "e4m3", emulate=True)}, 16)
    x = torch.randn(3, 5, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16 and y.shape == (3, 5, 48)
    assert torch.equal(y, layer.to(torch.bfloat16)(x.to(torch.bfloat16)))


def test_rows_of_each_expert_are_multiplied_by_its_matrix() -> None:
    x, weight, ends = torch.randn(9, 16), torch.randn(3, 32, 16), torch.tensor([4, 4, 9], dtype=torch.int32)
    y = multiply_groups(x, weight, ends, lambda rows, matrix: rows @ matrix.t(), 16)
    torch.testing.assert_close(y, grouped_linear(x, weight, None, ends))


@pytest.mark.parametrize(
    ("capability", "emulated"),
    [
        ((8, 0), {"tensorwise", "delayed", "rowwise", "blockwise", "mxfp8"}),
        ((8, 9), {"rowwise", "blockwise", "mxfp8"}),
        ((9, 0), {"mxfp8"}),
        ((10, 0), {"blockwise"}),
    ],
)
def test_recipes_are_emulated_without_their_hardware(
    capability: tuple[int, int], emulated: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: capability)
    assert {name for name in fp8.CAPABILITIES if is_emulated(name, torch.device("cuda", 0))} == emulated
    assert all(is_emulated(name, CPU) for name in fp8.CAPABILITIES)


def test_the_format_is_that_of_the_gradients() -> None:
    x, weight = torch.randn(16, 32), torch.randn(48, 32)
    for recipe in ("tensorwise", "rowwise"):
        grads = {}
        for formats in ("e4m3", "hybrid"):
            leaf = weight.clone().requires_grad_()
            y = build_product(recipe, formats, emulate=True)(x, leaf)
            (grads[formats],) = torch.autograd.grad(y, leaf, torch.sin(torch.arange(16.0 * 48)).view(16, 48))
        exact = torch.sin(torch.arange(16.0 * 48)).view(16, 48).t() @ x
        assert decibels(grads["e4m3"], exact) > decibels(grads["hybrid"], exact) + 2  # a bit more of mantissa


def test_defaults_of_formats() -> None:
    assert [settings.resolved_format for settings in DEFAULTS] == ["hybrid", "e4m3", "e4m3", "e4m3", "hybrid"]
    assert replace(DEFAULTS[0], format="e4m3").resolved_format == "e4m3"
