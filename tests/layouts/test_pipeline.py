"""What only a pipeline has to get right: frozen stages, micro-batches of unequal length, looking at the model."""

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
from litgpt.train.evaluate import generate_sample, validation_loss
from litgpt.train.objective import next_token
from litgpt.train.step import TrainState, gradients
from tests.layouts.layouts import Case, Facts, built, everything, facts, global_batch, noise, part_of, spoilt
from tests.layouts.pool import POOL

SCHEDULES = ("gpipe", "1f1b", "interleaved", "zbv")
TRAINED = {
    "early": ("embedding.", "blocks.0."),
    "middle": ("blocks.3.",),
    "late": ("blocks.6.", "norm."),
    "nothing of a block": ("norm.",),
}
OBJECTIVE = next_token(LossArgs(chunk_rows=7))


def pipelines(shape: str = "deep", ranks: int = 2, **more: Any) -> dict[str, Case]:
    """A case for every schedule."""
    return {name: Case(shape, ranks, {"pipeline": 2, "pipeline_schedule": name, **more}) for name in SCHEDULES}


def build_train_state(case: Case) -> TrainState:
    """A model of some weights, laid out as the case says."""
    mesh = Mesh(ParallelArgs(**case.parallel).resolve_dims(case.ranks), "cpu") if case.ranks > 1 else None
    model = built(case, mesh)
    for name, parameter in model.named_parameters():
        copy_full_tensor(parameter, noise(model.config, name, parameter.shape))
    return TrainState(apply_ddp(model, mesh), [], torch.device("cpu"), PRECISIONS["64-true"], mesh)


def gradient(train_state: TrainState, batches: list[Batch]) -> tuple[dict[str, Tensor], float]:
    """Every gradient in full, and their norm."""
    (count,) = all_reduce_sum([sum(batch.targets for batch in batches) * train_state.counts_batch], train_state.device)
    _, norm = gradients(train_state, batches, OBJECTIVE, count=count)
    found = everything(train_state.core, lambda parameter: parameter.grad)  # type: ignore[arg-type]
    train_state.zero_grad()
    return found, norm


def frozen(case: Case) -> dict[str, tuple[dict[str, Tensor], float]]:
    """Gradients where only some parts are trained, by which these are."""
    train_state, found = build_train_state(case), {}
    batches = part_of(global_batch(packed=False), 0, 1, case.micro)
    for which, trained in TRAINED.items():
        for name, parameter in train_state.core.named_parameters():
            parameter.requires_grad_(name.startswith(trained))
        found[which] = gradient(train_state, batches)
    return found


def ragged(case: Case) -> dict[str, tuple[dict[str, Tensor], float]]:
    """Gradients of micro-batches of unequal sizes, and of others after them."""
    train_state, whole = build_train_state(case), global_batch(packed=False)
    cuts = {"first": [(0, 1, 22), (1, 4, 9), (4, 5, 3)], "second": [(0, 2, 5), (2, 8, 17)]}
    return {
        name: gradient(
            train_state, [Batch(whole.ids[a:b, :length], whole.labels[a:b, :length]) for a, b, length in pieces]
        )
        for name, pieces in cuts.items()
    }


def compare(told: list[dict[str, tuple[dict[str, Tensor], float]]], wanted: dict[str, Any]) -> None:
    """Hold what the ranks have together against one process."""
    for which, (gradient_wanted, norm_wanted) in wanted.items():
        together: dict[str, Tensor] = {}
        for one in told:
            together |= one[which][0]
            assert one[which][1] == pytest.approx(norm_wanted, rel=1e-10)
        assert together.keys() == gradient_wanted.keys(), which
        for name, value in gradient_wanted.items():
            assert (together[name] - value).norm() <= 1e-10 * value.norm(), (which, name)


@pytest.mark.parametrize("work", [frozen, ragged], ids=lambda work: work.__name__)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_gradients_are_those_of_one_process(work: Callable[[Case], Any], schedule: str) -> None:
    case = pipelines()[schedule]
    compare(POOL.run(work, case, ranks=2), work(case.alone))


def looked(case: Case) -> tuple[float, list[int], bool]:
    """Validation loss and a text, before and after training; and whether parameters are shards again at the end."""
    train_state = build_train_state(case)
    whole = global_batch(packed=True)
    batches = part_of(whole, train_state.mesh.rank("data") if train_state.mesh else 0, case.ranks // 2 or 1, 1)
    gradient(train_state, batches)
    loss = validation_loss(train_state, batches, OBJECTIVE, max_iters=7)
    text = generate_sample(train_state, [3, 1, 4], max_new_tokens=6, window=5, seed=2)
    kept = {id(parameter) for parameter in train_state.core.parameters()}
    gradient(train_state, batches)
    return loss, text, kept == {id(parameter) for parameter in train_state.core.parameters()}


@pytest.mark.parametrize("case", [*pipelines("tied").values(), pipelines(ranks=4, data_shard=2)["zbv"]], ids=str)
def test_looking_at_a_model_finds_what_one_process_does(case: Case) -> None:
    wanted = looked(case.alone)
    for loss, text, kept in POOL.run(looked, case, ranks=case.ranks):
        if case.ranks == 2:
            assert loss == pytest.approx(wanted[0], rel=1e-12)
        assert (text, kept) == (wanted[1], True)


def without_the_other_copy(case: Case) -> Facts:
    """The embedding's gradients beside first and last layers stay apart."""
    Pipeline.sum_tied_gradients = lambda _self: None  # type: ignore[method-assign]
    return facts(case)


def with_all_copies(case: Case) -> Facts:
    """The embedding counts twice in the gradient's norm."""
    Pipeline.tied_copies = property(lambda _self: frozenset(), lambda _self, _value: None)  # type: ignore[assignment]
    return facts(case)


@pytest.mark.parametrize("broken", [without_the_other_copy, with_all_copies], ids=lambda broken: broken.__name__)
def test_a_copy_that_is_forgotten_shows(broken: Callable[[Case], Facts]) -> None:
    case = pipelines("tied")["1f1b"]
    assert max(spoilt(broken, case).values()) > 1e-4
