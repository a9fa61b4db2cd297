"""The chunked loss against the plain one."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from litgpt.data.stream.batch import IGNORE
from litgpt.train import cross_entropy
from litgpt.train.cross_entropy import Labels, chunked_cross_entropy, plain_cross_entropy


def problem(dtype: torch.dtype, biased: bool) -> tuple[list[torch.Tensor], torch.Tensor]:
    torch.manual_seed(0)
    shapes = [(2, 37, 16), (101, 16)] + ([(101,)] if biased else [])
    labels = torch.randint(0, 101, (2, 37))
    labels[0, :5] = IGNORE
    labels[1, -1] = IGNORE
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes], labels


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dft", [False, True])
@pytest.mark.parametrize(("biased", "softcap"), [(False, None), (True, None), (False, 2.0), (True, 2.0)])
@pytest.mark.parametrize("rows", [1, 7, 1000])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_loss_and_gradients_equal_the_plain_ones(
    dtype: torch.dtype, tolerance: float, rows: int, biased: bool, softcap: float | None, dft: bool, weighted: bool
) -> None:
    tensors, labels = problem(dtype, biased)
    arguments = [*tensors, *([] if biased else [None]), softcap]
    target = Labels(labels, torch.rand(labels.shape) if weighted else None, dft)
    plain = plain_cross_entropy(*arguments, target=target)
    chunked = chunked_cross_entropy(*arguments, target=target, chunk_rows=rows)
    torch.testing.assert_close(chunked, plain, rtol=tolerance, atol=0)
    wanted = torch.autograd.grad(plain * 0.37, tensors)
    for gradient, reference in zip(torch.autograd.grad(chunked * 0.37, tensors), wanted, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=tolerance, atol=tolerance)


def test_dft_moves_the_model_as_the_sum_of_its_probabilities_would() -> None:
    tensors, labels = problem(torch.float64, biased=False)
    kept = labels != IGNORE
    chosen = torch.nn.functional.linear(*tensors).softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0][kept]
    wanted = torch.autograd.grad(-chosen.sum(), tensors)
    loss = chunked_cross_entropy(*tensors, None, target=Labels(labels, dft=True), chunk_rows=16)
    for gradient, reference in zip(torch.autograd.grad(loss, tensors), wanted, strict=True):
        torch.testing.assert_close(gradient, reference)


def test_a_frozen_head_gets_no_gradient_and_changes_none() -> None:
    (hidden, weight), labels = problem(torch.float64, biased=False)
    both = chunked_cross_entropy(hidden, weight, None, target=Labels(labels), chunk_rows=16)
    alone = chunked_cross_entropy(hidden, weight.detach(), None, target=Labels(labels), chunk_rows=16)
    wanted, got = torch.autograd.grad(both, hidden)[0], torch.autograd.grad(alone, hidden)[0]
    assert torch.equal(got, wanted)


def test_all_labels_ignored_gives_zero_loss_and_zero_gradients() -> None:
    tensors, labels = problem(torch.float32, biased=True)
    loss = chunked_cross_entropy(*tensors, target=Labels(torch.full_like(labels, IGNORE)), chunk_rows=8)
    loss.backward()
    assert loss.item() == 0
    assert all(tensor.grad is not None and not tensor.grad.any() for tensor in tensors)


def test_no_gradients_are_made_where_none_are_wanted() -> None:
    tensors, labels = problem(torch.float32, biased=False)
    with torch.no_grad():
        loss = chunked_cross_entropy(*tensors, None, target=Labels(labels), chunk_rows=8)
    assert loss.grad_fn is None
    torch.testing.assert_close(loss, plain_cross_entropy(*tensors, None, target=Labels(labels)))


def test_bf16_autocast_is_as_close_to_float64_as_the_plain_loss() -> None:
    (hidden, weight), labels = problem(torch.float32, biased=False)
    exact = plain_cross_entropy(hidden.double(), weight.double(), None, target=Labels(labels))
    exact_gradient = torch.autograd.grad(exact, weight)[0]
    errors = []
    for loss_of in (plain_cross_entropy, lambda *a, **k: chunked_cross_entropy(*a, chunk_rows=16, **k)):
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(hidden, weight, None, target=Labels(labels))
        gradient = torch.autograd.grad(loss, weight)[0]
        errors.append((abs(loss.item() - exact.item()), (gradient - exact_gradient).norm().item()))
    (plain_loss, plain_gradient), (chunked_loss, chunked_gradient) = errors
    assert chunked_loss <= plain_loss + 0.01 * exact.item() / 74
    assert chunked_gradient <= 1.2 * plain_gradient


def test_products_of_whole_chunks_only_are_by_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = []

    @contextmanager
    def count_blocks() -> Iterator[None]:
        blocks.append(None)
        yield

    monkeypatch.setattr(cross_entropy, "is_faster_by_onednn", lambda *_: True)
    monkeypatch.setattr(cross_entropy, "onednn_products", count_blocks)
    tensors, labels = problem(torch.float32, biased=False)
    targets = int(labels.ne(IGNORE).sum())
    for rows, whole in ((targets // 2, 2), (targets // 2 + 1, 1), (targets, 1), (targets + 1, 0)):
        blocks.clear()
        chunked_cross_entropy(*tensors, None, target=Labels(labels), chunk_rows=rows)
        assert len(blocks) == 2 * whole  # those of logits, and those of gradients
