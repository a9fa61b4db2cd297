"""Delayed scaling is equal to its formula: scales of a step are those of the largest values of earlier steps."""

from typing import Any

import pytest
import torch
from torch import Tensor

from litgpt.model.delayed_scaling import AmaxHistory

pytest.importorskip("torchao")
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
Batches = list[tuple[Tensor, Tensor]]


def build(**settings: Any) -> AmaxHistory:
    given = {"length": 3, "algorithm": "max", "formats": "hybrid"} | settings
    return AmaxHistory(["a", "b"], **given, emulate=True, device=torch.device("cpu"))


def draw_steps(steps: int) -> tuple[Tensor, list[Batches]]:
    """A weight, and for every step two micro-batches of inputs and gradients, of different magnitudes."""
    draw = torch.Generator().manual_seed(4)
    sizes = [3.0, 0.1, 20.0, 0.5, 1.0]

    def values(rows: int, columns: int, size: float) -> Tensor:
        return torch.randn(rows, columns, generator=draw) * size

    batches = [[(values(16, 32, size), values(16, 48, 1e-4 * size)) for _ in range(2)] for size in sizes[:steps]]
    return values(48, 32, 0.1), batches


def run(history: AmaxHistory, weight: Tensor, steps: list[Batches], **update: Any) -> list[list[Tensor]]:
    """Output and gradients of every micro-batch of every step."""
    product, results = history.build_product("b"), []
    for batches in steps:
        for x, grad in batches:
            leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
            y = product(*leaves)
            results.append([y.detach(), *torch.autograd.grad(y, leaves, grad)])
        history.update(lambda values: values, skipped=False, **update)
    return results


def round_to(values: Tensor, amax: float, dtype: torch.dtype) -> Tensor:
    """Values rounded to FP8 with the scale FP8_MAX / amax; those that are larger are limited."""
    limit = torch.finfo(dtype).max
    scale = torch.tensor(limit) / torch.tensor(amax)
    return (values * scale).clamp(-limit, limit).to(dtype).float() / scale


@pytest.mark.parametrize("algorithm", ["max", "most_recent"])
@pytest.mark.parametrize("length", [1, 3])
@pytest.mark.parametrize("formats", ["hybrid", "e4m3"])
def test_products_are_those_of_the_formula(algorithm: str, length: int, formats: str) -> None:
    weight, steps = draw_steps(5)
    results = iter(run(build(length=length, algorithm=algorithm, formats=formats), weight, steps))
    past: list[list[float]] = []
    dtypes = [E4M3, E4M3, E5M2 if formats == "hybrid" else E4M3]
    for batches in steps:
        for x, grad in batches:
            operands = (x, weight, grad)
            if past:
                window = past[-length:] if algorithm == "max" else past[-1:]
                scales = [max(values) for values in zip(*window, strict=True)]
            else:
                scales = [operand.abs().max().item() for operand in operands]
            x8, w8, g8 = (round_to(*values) for values in zip(operands, scales, dtypes, strict=True))
            for value, exact in zip(next(results), (x8 @ w8.T, g8 @ w8, g8.T @ x8), strict=True):
                torch.testing.assert_close(value, exact, rtol=1e-5, atol=1e-9)
        inputs, grads = zip(*batches, strict=True)
        largest = (max(x.abs().max().item() for x in values) for values in (inputs, [weight], grads))
        past.append(list(largest))


def test_the_scales_do_not_depend_on_micro_batches() -> None:
    weight, steps = draw_steps(3)
    whole = [[tuple(torch.cat(values) for values in zip(*batches, strict=True))] for batches in steps]
    first, second = build(), build()
    run(first, weight, steps)
    run(second, weight, whole)  # type: ignore[arg-type]
    assert torch.equal(first.history_HM3, second.history_HM3) and torch.equal(first.scale_M3, second.scale_M3)
    assert first.history_HM3[:, 0].count_nonzero() == 0 and first.history_HM3.shape == (3, 2, 3)


def test_a_skipped_step_and_inference_leave_no_trace() -> None:
    weight, steps = draw_steps(2)
    history = build()
    run(history, weight, steps)
    before = history.to_text()
    with torch.no_grad():
        history.build_product("b")(steps[0][0][0] * 100, weight)
    assert not history.step_M3.any()
    y = history.build_product("b")(steps[0][0][0] * 100, weight.clone().requires_grad_())
    y.sum().backward()
    history.update(lambda values: values, skipped=True)
    assert history.to_text() == before and not history.step_M3.any()


def test_the_largest_value_is_that_of_all_ranks() -> None:
    history = build()
    history.update(lambda values: values + 2, skipped=False)
    assert torch.equal(history.history_HM3[0], torch.full((2, 3), 2.0))
    assert history.scale_M3[0].tolist() == [224.0, 224.0, 57344.0 / 2]


@pytest.mark.parametrize("length", [1, 3])
def test_a_history_is_restored_to_the_bit(length: int) -> None:
    weight, steps = draw_steps(5)
    straight, saved, resumed = build(), build(), build(length=length)
    expected = run(straight, weight, steps)[6:]
    run(saved, weight, steps[:3])
    resumed.load_text(saved.to_text())
    actual = run(resumed, weight, steps[3:])
    pairs = [pair for values in zip(expected, actual, strict=True) for pair in zip(*values, strict=True)]
    assert all(torch.equal(*pair) for pair in pairs) == (length == 3)
    assert len(resumed.history_HM3) == length


def test_matrices_that_a_checkpoint_lacks_start_anew() -> None:
    weight, steps = draw_steps(1)
    saved = build()
    run(saved, weight, steps)
    other = AmaxHistory(
        ["b", "c"], length=3, algorithm="max", formats="hybrid", emulate=True, device=torch.device("cpu")
    )
    other.load_text(saved.to_text())
    assert torch.equal(other.history_HM3[0, 0], saved.history_HM3[0, 1])
    assert other.scale_M3[0].all() and not other.scale_M3[1].any()
