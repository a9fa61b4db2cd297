"""The RMS norm of training on a CPU against torch's."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from litgpt.model.cpu_norm import normalize_on_cpu
from litgpt.model.layers import RMSNorm

SHAPE = (3, 5, 24)


def keep(saved: list[Tensor], tensor: Tensor) -> Tensor:
    """Add a tensor that is saved to a list."""
    saved.append(tensor)
    return tensor


def compute(x: Tensor, norm: RMSNorm, *, by_torch: bool) -> list[Tensor]:
    """The norm and its gradients."""
    wide = torch.promote_types(x.dtype, norm.weight.dtype)
    weight = norm.weight.to(wide)
    y = F.rms_norm(x.to(wide), weight.shape, weight, norm.eps).to(x.dtype) if by_torch else norm(x)
    return [y, *torch.autograd.grad(y.float().square().sum(), [x, norm.weight])]


@pytest.mark.parametrize("weight", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_values_and_gradients_are_those_of_torch(dtype: torch.dtype, weight: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(SHAPE).to(dtype).requires_grad_()
    norm = RMSNorm(SHAPE[-1], 1e-5).to(weight)
    torch.nn.init.normal_(norm.weight)
    for computed, expected in zip(compute(x, norm, by_torch=False), compute(x, norm, by_torch=True), strict=True):
        assert computed.dtype == expected.dtype
        assert torch.equal(computed, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_the_input_and_a_number_per_row_are_saved(dtype: torch.dtype) -> None:
    x = torch.zeros(SHAPE, dtype=dtype, requires_grad=True)
    saved: list[Tensor] = []
    with saved_tensors_hooks(partial(keep, saved), lambda tensor: tensor):
        RMSNorm(SHAPE[-1], 1e-5)(x)
    assert sorted(tensor.numel() for tensor in saved) == [15, 24, 360]
    assert any(tensor is x or tensor.data_ptr() == x.data_ptr() for tensor in saved)


def test_a_single_row_has_the_gradients_of_torch() -> None:
    norm, x = RMSNorm(24, 1e-5), torch.randn(24, requires_grad=True)
    for computed, expected in zip(compute(x, norm, by_torch=False), compute(x, norm, by_torch=True), strict=True):
        assert torch.equal(computed, expected)


@pytest.mark.parametrize("frozen", [False, True])
def test_gradients_have_gradients(frozen: bool) -> None:
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, dtype=torch.float64, requires_grad=not frozen)
    assert torch.autograd.gradgradcheck(partial(normalize_on_cpu, eps=1e-5), (x, weight))


def test_only_gradients_that_are_needed_are_computed() -> None:
    norm, x = RMSNorm(24, 1e-5), torch.randn(SHAPE)
    expected = torch.autograd.grad(norm(x).square().sum(), [norm.weight])
    norm.weight.requires_grad_(False)
    x.requires_grad_()
    (of_x,) = torch.autograd.grad(norm(x).square().sum(), [x])
    norm.weight.requires_grad_()
    both = torch.autograd.grad(norm(x).square().sum(), [x, norm.weight])
    assert torch.equal(of_x, both[0]) and torch.equal(expected[0], both[1])
