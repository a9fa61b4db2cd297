"""Pipelines: frozen stages, micro-batches of unequal length, evaluation."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from litgpt.data.stream.batch import Batch
from litgpt.parallel.apply import apply_ddp, copy_full_tensor
from litgpt.parallel.mesh import Mesh
from litgpt.parallel.pipeline import Pipeline
from litgpt.parallel.precision import PRECISIONS
from litgpt.parallel.reduce import all_reduce_sum
from litgpt.recipe.parallel import ParallelArgs
from litgpt.recipe.train import LossArgs
from litgpt.train.evaluate import compute_validation_metrics, sample_continuation
from litgpt.train.objective import next_token
from litgpt.train.step import compute_gradients
from litgpt.train.train_state import TrainState
from tests.layouts.layouts import (
    Case,
    Facts,
    build_global_batch,
    build_model,
    collect_facts,
    collect_full_tensors,
    draw_values,
    measure_mutation,
    take_micro_batches,
)
from tests.layouts.pool import POOL

SCHEDULES = ("gpipe", "1f1b", "interleaved", "zbv")
TRAINED = {
    "early": ("embedding.", "blocks.0."),
    "middle": ("blocks.3.",),
    "late": ("blocks.6.", "norm."),
    "nothing of a block": ("norm.",),
}
OBJECTIVE = next_token(LossArgs(chunk_rows=7))


def build_cases(shape: str = "deep", ranks: int = 2, **more: Any) -> dict[str, Case]:
    """A case for every schedule."""
    return {name: Case(shape, ranks, {"pipeline": 2, "pipeline_schedule": name, **more}) for name in SCHEDULES}


def build_train_state(case: Case) -> TrainState:
    """A model with the layout of the case."""
    mesh = Mesh(ParallelArgs(**case.parallel).resolve_dims(case.ranks), "cpu") if case.ranks > 1 else None
    model = build_model(case, mesh)
    for name, parameter in model.named_parameters():
        copy_full_tensor(parameter, draw_values(model.config, name, parameter.shape))
    return TrainState(apply_ddp(model, mesh), [], torch.device("cpu"), PRECISIONS["64-true"], mesh)


def compute_gradient(train_state: TrainState, batches: list[Batch]) -> tuple[dict[str, Tensor], float]:
    """Every gradient in full, and the gradient norm."""
    counts = all_reduce_sum([sum(batch.targets for batch in batches) * train_state.counts_batch], train_state.device)
    _, norm = compute_gradients(train_state, batches, OBJECTIVE, counts=counts)
    grads = collect_full_tensors(train_state.core, lambda parameter: parameter.grad)  # type: ignore[arg-type]
    train_state.zero_grad()
    return grads, norm


def train_partly_frozen(case: Case) -> dict[str, tuple[dict[str, Tensor], float]]:
    """Gradients if only some parts are trained, by part."""
    train_state, results = build_train_state(case), {}
    batches = take_micro_batches(build_global_batch(packed=False), 0, 1, case.micro)
    for part, trained in TRAINED.items():
        for name, parameter in train_state.core.named_parameters():
            parameter.requires_grad_(name.startswith(trained))
        results[part] = compute_gradient(train_state, batches)
    return results


def train_ragged(case: Case) -> dict[str, tuple[dict[str, Tensor], float]]:
    """Gradients of micro-batches of unequal sizes, of two steps."""
    train_state, whole = build_train_state(case), build_global_batch(packed=False)
    steps = {"first": [(0, 1, 22), (1, 4, 9), (4, 5, 3)], "second": [(0, 2, 5), (2, 8, 17)]}
    return {
        name: compute_gradient(
            train_state, [Batch(whole.ids[a:b, :length], whole.labels[a:b, :length]) for a, b, length in slices]
        )
        for name, slices in steps.items()
    }


def compare(results: list[dict[str, tuple[dict[str, Tensor], float]]], expected: dict[str, Any]) -> None:
    """Compare the gradients of all ranks with those of a single process."""
    for key, (expected_grads, expected_norm) in expected.items():
        grads: dict[str, Tensor] = {}
        for result in results:
            grads |= result[key][0]
            assert result[key][1] == pytest.approx(expected_norm, rel=1e-10)
        assert grads.keys() == expected_grads.keys(), key
        for name, value in expected_grads.items():
            assert (grads[name] - value).norm() <= 1e-10 * value.norm(), (key, name)


@pytest.mark.parametrize("work", [train_partly_frozen, train_ragged], ids=lambda work: work.__name__)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_gradients_are_those_of_one_process(work: Callable[[Case], Any], schedule: str) -> None:
    case = build_cases()[schedule]
    compare(POOL.run(work, case, ranks=2), work(case.single_process))


def evaluate_case(case: Case) -> tuple[float, list[int], bool]:
    """Validation loss and a sample after a step; and whether parameters are resharded after another one."""
    train_state = build_train_state(case)
    whole = build_global_batch(packed=True)
    batches = take_micro_batches(
        whole, train_state.mesh.rank("data") if train_state.mesh else 0, case.ranks // 2 or 1, 1
    )
    compute_gradient(train_state, batches)
    loss = compute_validation_metrics(train_state, batches, OBJECTIVE, max_iters=7)["val_loss"]
    text = sample_continuation(train_state, [3, 1, 4], max_new_tokens=6, window=5, seed=2)
    parameters = {id(parameter) for parameter in train_state.core.parameters()}
    compute_gradient(train_state, batches)
    return loss, text, parameters == {id(parameter) for parameter in train_state.core.parameters()}


@pytest.mark.parametrize("case", [*build_cases("tied").values(), build_cases(ranks=4, data_shard=2)["zbv"]], ids=str)
def test_evaluation_is_that_of_one_process(case: Case) -> None:
    expected = evaluate_case(case.single_process)
    for loss, text, is_resharded in POOL.run(evaluate_case, case, ranks=case.ranks):
        if case.ranks == 2:
            assert loss == pytest.approx(expected[0], rel=1e-12)
        assert (text, is_resharded) == (expected[1], True)


def without_tied_gradient_sum(case: Case) -> Facts:
    """The gradients of the tied embedding are not summed over its two devices."""
    Pipeline.sum_tied_gradients = lambda _self: None  # type: ignore[method-assign]
    return collect_facts(case)


def with_all_copies(case: Case) -> Facts:
    """The tied embedding counts twice in the gradient norm."""
    Pipeline.tied_copies = property(lambda _self: frozenset(), lambda _self, _value: None)  # type: ignore[assignment]
    return collect_facts(case)


@pytest.mark.parametrize(
    "mutation", [without_tied_gradient_sum, with_all_copies], ids=lambda mutation: mutation.__name__
)
def test_a_missing_copy_is_noticed(mutation: Callable[[Case], Facts]) -> None:
    case = build_cases("tied")["1f1b"]
    assert max(measure_mutation(mutation, case).values()) > 1e-4
