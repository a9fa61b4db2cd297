"""Prediction layers are trained on every layout as in one process."""

from dataclasses import replace

import pytest

from litgpt.parallel import pipeline
from litgpt.recipe.moe import MoEArgs
from litgpt.recipe.recompute import RecomputeArgs
from tests.layouts.layouts import Case, Facts, collect_facts, find_deviations, measure_mutation

SEQ = MoEArgs(aux_loss_coeff=0.5, router_load_balancing_type="seq_aux_loss", router_bias_update_rate=0.05)
GROUPS = RecomputeArgs("full", num_layers=2)
PREDICTIONS = Case("predictions", packed=True, objective="predictions")
CASES = [
    replace(PREDICTIONS, micro=1, moe=SEQ),  # accumulation
    replace(PREDICTIONS, ranks=2, parallel={"context": 2}, moe=SEQ),
    replace(PREDICTIONS, ranks=2, parallel={"pipeline": 2}, moe=SEQ),
]
SLOW = [
    replace(PREDICTIONS, ranks=2, parallel={"data_shard": 2, "expert": 2, "prefetch": 1}),
    replace(PREDICTIONS, more={"recompute": GROUPS}),
    replace(PREDICTIONS, ranks=2, parallel={"data_shard": 2, "prefetch": 1}),
    replace(PREDICTIONS, ranks=2, parallel={"tensor": 2}),
    Case("dense predictions", 2, {"tensor": 2, "sequence": False}, objective="one prediction"),
    Case("predictions", 2, {"data_shard": 2, "prefetch": 1}, tuner="lora"),  # they are frozen, and do not run
    replace(PREDICTIONS, ranks=2, parallel={"data_replicate": 2}),
    Case("predictions", 4, {"pipeline": 2, "data_shard": 2}, tuner="lora"),
    replace(PREDICTIONS, shape="deep predictions", ranks=2, parallel={"pipeline": 2, "pipeline_schedule": "zbv"}),
    replace(PREDICTIONS, ranks=2, parallel={"context": 2, "context_method": "ulysses"}),
    replace(PREDICTIONS, ranks=4, parallel={"pipeline": 2, "data_shard": 2, "expert": 2}, moe=SEQ),
    replace(PREDICTIONS, ranks=4, parallel={"pipeline": 2, "tensor": 2}),
    replace(PREDICTIONS, ranks=4, parallel={"context": 2, "tensor": 2}, moe=SEQ),
    Case("dense predictions", 2, {"context": 2, "context_method": "ring"}, objective="one prediction"),
    replace(
        PREDICTIONS,
        shape="deep predictions",
        ranks=4,
        parallel={"pipeline": 2, "data_shard": 2, "pipeline_schedule": "interleaved"},
    ),
]


@pytest.mark.parametrize("case", [*CASES, *(pytest.param(case, marks=pytest.mark.slow) for case in SLOW)], ids=str)
def test_prediction_layers_are_trained_as_in_one_process(case: Case) -> None:
    assert find_deviations(case) == {}


def without_the_embedding_of_the_last_stage(case: Case) -> Facts:
    """The gradients of the embedding's copy on the last stage are not summed with those of the first."""
    pipeline.Pipeline.sum_tied_gradients = lambda _self: None  # type: ignore[method-assign]
    return collect_facts(case)


@pytest.mark.slow
def test_a_missing_sum_over_stages_is_noticed() -> None:
    case = replace(PREDICTIONS, ranks=2, parallel={"pipeline": 2})
    assert measure_mutation(without_the_embedding_of_the_last_stage, case)["gradient"] > 1e-2
