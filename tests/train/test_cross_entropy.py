"""The chunked loss against the plain one."""

import pytest
import torch

from litgpt.data.batch import IGNORE
from litgpt.train.cross_entropy import chunked_cross_entropy, plain_cross_entropy


def problem(dtype: torch.dtype, biased: bool) -> tuple[list[torch.Tensor], torch.Tensor]:
    torch.manual_seed(0)
    shapes = [(2, 37, 16), (101, 16)] + ([(101,)] if biased else [])
    labels = torch.randint(0, 101, (2, 37))
    labels[0, :5] = IGNORE
    labels[1, -1] = IGNORE
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes], labels


@pytest.mark.parametrize(("biased", "softcap"), [(False, None), (True, None), (False, 2.0), (True, 2.0)])
@pytest.mark.parametrize("rows", [1, 7, 1000])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_loss_and_gradients_equal_the_plain_ones(
    dtype: torch.dtype, tolerance: float, rows: int, biased: bool, softcap: float | None
) -> None:
    tensors, labels = problem(dtype, biased)
    arguments = [*tensors, *([] if biased else [None]), softcap]
    plain = plain_cross_entropy(*arguments, labels_BT=labels)
    chunked = chunked_cross_entropy(*arguments, labels_BT=labels, chunk_rows=rows)
    torch.testing.assert_close(chunked, plain, rtol=tolerance, atol=0)
    wanted = torch.autograd.grad(plain * 0.37, tensors)
    for gradient, reference in zip(torch.autograd.grad(chunked * 0.37, tensors), wanted, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=tolerance, atol=tolerance)


def test_all_labels_ignored_gives_zero_loss_and_zero_gradients() -> None:
    tensors, labels = problem(torch.float32, biased=True)
    loss = chunked_cross_entropy(*tensors, labels_BT=torch.full_like(labels, IGNORE), chunk_rows=8)
    loss.backward()
    assert loss.item() == 0
    assert all(tensor.grad is not None and not tensor.grad.any() for tensor in tensors)


def test_no_gradients_are_made_where_none_are_wanted() -> None:
    tensors, labels = problem(torch.float32, biased=False)
    with torch.no_grad():
        loss = chunked_cross_entropy(*tensors, None, labels_BT=labels, chunk_rows=8)
    assert loss.grad_fn is None
    torch.testing.assert_close(loss, plain_cross_entropy(*tensors, None, labels_BT=labels))


def test_bf16_autocast_is_as_close_to_float64_as_the_plain_loss() -> None:
    (hidden, weight), labels = problem(torch.float32, biased=False)
    exact = plain_cross_entropy(hidden.double(), weight.double(), None, labels_BT=labels)
    exact_gradient = torch.autograd.grad(exact, weight)[0]
    errors = []
    for loss_of in (plain_cross_entropy, lambda *a, **k: chunked_cross_entropy(*a, chunk_rows=16, **k)):
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(hidden, weight, None, labels_BT=labels)
        gradient = torch.autograd.grad(loss, weight)[0]
        errors.append((abs(loss.item() - exact.item()), (gradient - exact_gradient).norm().item()))
    (plain_loss, plain_gradient), (chunked_loss, chunked_gradient) = errors
    assert chunked_loss <= plain_loss + 0.01 * exact.item() / 74
    assert chunked_gradient <= 1.2 * plain_gradient
