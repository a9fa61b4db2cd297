"""The log-probabilities of labels and their gradients against those from all logits."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from litgpt.data.stream.batch import IGNORE
from litgpt.train.log_probs import TokenLabels, chunked_log_probs, plain_log_probs

SHAPE, WIDTH, VOCABULARY = (2, 37), 16, 101


def problem(dtype: torch.dtype, *, biased: bool) -> tuple[list[Tensor], Tensor, Tensor]:
    """Hidden states, weight and bias; labels; the upstream gradient of each log-probability."""
    torch.manual_seed(0)
    labels = torch.randint(0, VOCABULARY, SHAPE)
    labels[0, :5] = IGNORE
    labels[1, -1] = IGNORE
    shapes = [(*SHAPE, WIDTH), (VOCABULARY, WIDTH)] + ([(VOCABULARY,)] if biased else [])
    tensors = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    return [tensor.to(dtype).requires_grad_() for tensor in tensors], labels, torch.randn(labels.numel()).to(dtype)


def formula(tensors: list[Tensor], labels: Tensor, softcap: float | None) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities, log sum p^2 and mean logits (N,) in float64."""
    logits = F.linear(*[tensor.double() for tensor in tensors]).flatten(0, 1)
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    probabilities = logits.softmax(-1)
    kept = labels.flatten() != IGNORE
    chosen = probabilities[torch.arange(len(kept)), labels.flatten().clamp(min=0)].log()
    return chosen * kept, probabilities.square().sum(-1).log() * kept, logits.mean(-1) * kept


@pytest.mark.parametrize("rows", [1, 7, 1000])
@pytest.mark.parametrize(("biased", "softcap"), [(False, None), (True, None), (False, 2.0), (True, 2.0)])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 5e-6)])
def test_values_and_gradients_equal_the_formula(
    dtype: torch.dtype, tolerance: float, frozen: bool, biased: bool, softcap: float | None, rows: int
) -> None:
    tensors, labels, upstream = problem(dtype, biased=biased)
    wanted = formula(tensors, labels, softcap)
    gradients = torch.autograd.grad((wanted[0] * upstream.double()).sum(), tensors)
    for tensor in tensors[1:] if frozen else []:
        tensor.requires_grad_(False)
    target = TokenLabels(labels, torch.zeros(labels.numel(), dtype=dtype), torch.zeros(labels.numel(), dtype=dtype))
    got = chunked_log_probs(*tensors, *([] if biased else [None]), softcap, target=target, chunk_rows=rows)
    got.backward(upstream)
    for values, reference in zip((got, target.log_squares_N, target.mean_logits_N), wanted, strict=True):
        torch.testing.assert_close(values.double(), reference, rtol=tolerance, atol=tolerance)
    for tensor, reference in zip(tensors, gradients, strict=True):
        if tensor.requires_grad:
            torch.testing.assert_close(tensor.grad.double(), reference.double(), rtol=tolerance, atol=4 * tolerance)
        else:
            assert tensor.grad is None


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_the_plain_ones_equal_the_formula(softcap: float | None) -> None:
    tensors, labels, upstream = problem(torch.float64, biased=True)
    wanted = formula(tensors, labels, softcap)
    target = TokenLabels(labels, *(torch.zeros(labels.numel(), dtype=torch.float64) for _ in range(2)))
    got = plain_log_probs(*tensors, softcap, target=target)
    for values, reference in zip((got, target.log_squares_N, target.mean_logits_N), wanted, strict=True):
        torch.testing.assert_close(values, reference)
    gradients = torch.autograd.grad(got, tensors, upstream)
    for gradient, reference in zip(gradients, torch.autograd.grad(wanted[0], tensors, upstream), strict=True):
        torch.testing.assert_close(gradient, reference)


@pytest.mark.parametrize("frozen", [False, True])
def test_bf16_autocast_is_as_close_to_float64_as_the_plain_ones(frozen: bool) -> None:
    tensors, labels, upstream = problem(torch.float32, biased=False)
    tensors[1].requires_grad_(not frozen)
    wanted = formula(tensors, labels, None)[0]
    trained = tensors[: 1 if frozen else 2]
    exact = torch.autograd.grad(wanted, trained, upstream.double())
    errors = []
    for compute in (plain_log_probs, lambda *args, **keys: chunked_log_probs(*args, chunk_rows=16, **keys)):
        with torch.autocast("cpu", torch.bfloat16):
            got = compute(*tensors, None, target=TokenLabels(labels))
        assert got.dtype == torch.float32
        gradients = torch.autograd.grad(got, trained, upstream)
        errors.append([(got - wanted).norm().item()])
        errors[-1] += [(a - b).norm().item() for a, b in zip(gradients, exact, strict=True)]
    for plain, chunked in zip(*errors, strict=True):
        assert chunked <= 1.2 * plain


def test_a_backward_pass_in_two_halves_gives_the_same_gradients() -> None:
    for frozen in (False, True):
        tensors, labels, upstream = problem(torch.float64, biased=True)
        for tensor in tensors[1:]:
            tensor.requires_grad_(not frozen)
        got = chunked_log_probs(*tensors, target=TokenLabels(labels), chunk_rows=16)
        trained = [tensor for tensor in tensors if tensor.requires_grad]
        once = torch.autograd.grad(got, trained, upstream, retain_graph=True)
        for gradient, reference in zip(torch.autograd.grad(got, trained, upstream), once, strict=True):
            assert torch.equal(gradient, reference)


def test_all_labels_ignored_gives_zeros() -> None:
    tensors, labels, upstream = problem(torch.float32, biased=True)
    got = chunked_log_probs(*tensors, target=TokenLabels(torch.full_like(labels, IGNORE)), chunk_rows=8)
    got.backward(upstream)
    assert not got.any()
    assert all(tensor.grad is not None and not tensor.grad.any() for tensor in tensors)


def test_no_gradients_are_made_where_none_are_wanted() -> None:
    tensors, labels, _ = problem(torch.float32, biased=False)
    with torch.no_grad():
        got = chunked_log_probs(*tensors, None, target=TokenLabels(labels), chunk_rows=8)
    assert got.grad_fn is None
    torch.testing.assert_close(got, plain_log_probs(*tensors, None, target=TokenLabels(labels)).detach())


class ThreadShard:
    """The rows of one of several threads, whose collectives exchange tensors in memory."""

    def __init__(self, number: int, rows: int, slots: list[Tensor | None], barrier: Barrier) -> None:
        self.first_row, self.number, self.slots, self.barrier = number * rows, number, slots, barrier

    def exchange(self, values: Tensor) -> Tensor:
        self.slots[self.number] = values.detach()
        self.barrier.wait()
        gathered = torch.stack(self.slots)  # type: ignore[arg-type]
        self.barrier.wait()
        return gathered

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        return self.exchange(values).sum(0)

    def all_reduce_max(self, values: Tensor) -> Tensor:
        return self.exchange(values).amax(0)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("frozen", [False, True])
def test_shards_of_the_vocabulary_have_terms_of_the_gradients(frozen: bool, softcap: float | None) -> None:
    (hidden, weight, bias), labels, upstream = problem(torch.float64, biased=True)
    weight, bias = weight.detach()[:100].requires_grad_(), bias.detach()[:100].requires_grad_()
    labels = labels.clamp(max=99)
    wanted = formula([hidden, weight, bias], labels, softcap)
    gradients = torch.autograd.grad(wanted[0], [hidden, weight, bias], upstream)
    slots: list[Tensor | None] = [None, None]
    barrier = Barrier(2, timeout=60)

    def run(number: int) -> tuple[list[Tensor], list[Tensor | None]]:
        rows = slice(50 * number, 50 * (number + 1))
        local = [tensor.detach().clone().requires_grad_(not frozen) for tensor in (weight[rows], bias[rows])]
        inputs = hidden.detach().clone().requires_grad_()
        target = TokenLabels(labels, *(torch.zeros(labels.numel(), dtype=torch.float64) for _ in range(2)))
        shard = ThreadShard(number, 50, slots, barrier)
        got = chunked_log_probs(inputs, *local, softcap, target=target, chunk_rows=16, vocabulary=shard)
        assert target.log_squares_N is not None and target.mean_logits_N is not None
        got.backward(upstream)
        return [got.detach(), target.log_squares_N, target.mean_logits_N], [inputs.grad, *[x.grad for x in local]]

    with ThreadPoolExecutor(2) as pool:
        shards = list(pool.map(run, range(2)))
    for values, _ in shards:
        for value, reference in zip(values, wanted, strict=True):
            torch.testing.assert_close(value, reference.detach())
    torch.testing.assert_close(shards[0][1][0] + shards[1][1][0], gradients[0])
    if not frozen:
        for index in (1, 2):
            torch.testing.assert_close(torch.cat([shards[0][1][index], shards[1][1][index]]), gradients[index])
