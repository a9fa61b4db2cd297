"""What plans compute on the CPU has the values of torch's, and saves what is saved on CUDA."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from litgpt.model.config import Config
from litgpt.model.moe import Experts
from litgpt.plan.accelerator_paths import accelerator_paths
from litgpt.plan.fake_cuda import DEVICE, fake_cuda
from tests.plan.test_memory import EXPERTS

SIZE = 8


def compute(dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """The norm of random numbers, and its gradients."""
    x, weight = (torch.randn(*shape, dtype=dtype, device=device) for shape in ((3, 5, SIZE), (SIZE,)))
    x, weight = x.requires_grad_(), weight.requires_grad_()
    y = F.rms_norm(x, (SIZE,), weight, 1e-5)
    return [y, *torch.autograd.grad(y.sum() + y.square().sum(), [x, weight])]


def list_saved(dtype: torch.dtype, device: torch.device) -> list[tuple[Any, ...]]:
    """Shapes and types of what is saved for the backward pass."""
    saved: list[tuple[Any, ...]] = []
    x, weight = (torch.zeros(*shape, dtype=dtype, device=device) for shape in ((3, 5, SIZE), (SIZE,)))
    with saved_tensors_hooks(lambda t: saved.append((*t.shape, t.dtype)), lambda t: t):
        F.rms_norm(x.requires_grad_(), (SIZE,), weight.requires_grad_(), 1e-5)
    return sorted(saved, key=str)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_norms_are_those_of_torch(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    expected = compute(dtype, torch.device("cpu"))
    torch.manual_seed(0)
    with accelerator_paths():
        torch.testing.assert_close(compute(dtype, torch.device("cpu")), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_save_what_they_do_on_cuda(dtype: torch.dtype) -> None:
    with fake_cuda(), FakeTensorMode():
        on_cuda = list_saved(dtype, DEVICE)
    assert len(on_cuda) == 3
    assert list_saved(dtype, torch.device("cpu")) != on_cuda
    with accelerator_paths():
        assert list_saved(dtype, torch.device("cpu")) == on_cuda


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_attention_with_short_values_is_that_of_torch_and_saves_no_scores(dtype: torch.dtype, causal: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    shapes = [(2, 3, 37, 24), (2, 3, 37, 24), (2, 3, 37, 16), (2, 3, 37, 16)]
    *leaves, grad = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    q, k, v = (x.requires_grad_() for x in leaves)
    results, saved = [], []
    for paths in (nullcontext(), accelerator_paths()):
        shapes_saved: list[tuple[int, ...]] = []
        hooks = saved_tensors_hooks(lambda t, shapes=shapes_saved: shapes.append(tuple(t.shape)) or t, lambda t: t)
        with paths, hooks:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
            results.append([y, *torch.autograd.grad(y, (q, k, v), grad)])
        saved.append(shapes_saved)
    tolerance = {"atol": 0.05, "rtol": 0.05} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(results[1], results[0], **tolerance)
    scores = (37, 37)
    assert any(shape[-2:] == scores for shape in saved[0])
    assert sorted(saved[1]) == sorted([*shapes, (2, 3, 37)])
    assert results[1][0].transpose(1, 2).is_contiguous()


def test_experts_do_not_copy_their_matrices() -> None:
    experts, rows = Experts(Config(**EXPERTS)), 512
    x_RD = torch.randn(rows, EXPERTS["n_embd"], requires_grad=True)
    ends_E = torch.arange(1, 5, dtype=torch.int32) * rows // 4
    saved: list[tuple[int, ...]] = []
    copy = (experts.gate.shape[0], EXPERTS["n_embd"], 2 * experts.gate.shape[1])
    with saved_tensors_hooks(lambda t: saved.append(tuple(t.shape)) or t, lambda t: t):
        expected = experts(x_RD, ends_E)
        assert copy in saved
        saved.clear()
        with accelerator_paths():
            torch.testing.assert_close(experts(x_RD, ends_E), expected)
    assert copy not in saved
