"""Routers are trained on every layout as in one process: gradients, corrections, counts and metrics."""

from dataclasses import replace
from typing import Any

import pytest

from litgpt.recipe.moe import MoEArgs
from litgpt.recipe.recompute import RecomputeArgs
from litgpt.train import router_training
from tests.layouts.layouts import ROWS, Case, Facts, collect_facts, find_deviations, measure_mutation

AUX = MoEArgs(aux_loss_coeff=0.5, z_loss_coeff=0.1)
SEQ = MoEArgs(aux_loss_coeff=0.5, router_load_balancing_type="seq_aux_loss", router_bias_update_rate=0.05)
GLOBAL = MoEArgs(aux_loss_coeff=0.5, router_load_balancing_type="global_aux_loss")
PROBS = MoEArgs(aux_loss_coeff=0.5, expert_capacity_factor=0.8)
POSITION = replace(PROBS, token_drop_policy="position", pad_expert_input_to_capacity=True)
SINKHORN = MoEArgs(router_load_balancing_type="sinkhorn")
FULL = {"recompute": RecomputeArgs(granularity="full")}
CASES = [
    # one process: accumulation and recomputation
    Case("corrected", 1, {}, moe=SEQ, micro=1, packed=True),
    Case("corrected", 1, {}, moe=SEQ, more=FULL),
    Case("shared experts", 1, {}, moe=AUX, more={"recompute": RecomputeArgs("selective", modules=["moe"])}, micro=ROWS),
    # experts, data, tensor, context, pipeline
    Case("corrected", 2, {"expert": 2}, moe=SEQ),
    Case("corrected", 4, {"expert": 4, "expert_dispatch": "all-gather"}, moe=GLOBAL),
    Case("shared experts", 4, {"expert": 2, "tensor": 2}, moe=AUX, fixed_micro=True),
    Case("shared experts", 2, {"tensor": 2}, moe=GLOBAL, micro=ROWS),
    Case("corrected", 2, {"context": 2}, moe=SEQ, packed=True),
    Case("corrected", 4, {"context": 2, "data_replicate": 2}, moe=SEQ),
    Case("shared experts", 2, {"pipeline": 2}, moe=AUX, fixed_micro=True, more=FULL),
    Case("corrected", 4, {"pipeline": 2, "data_shard": 2, "expert": 2}, moe=SEQ, micro=1),
    Case("corrected", 2, {"pipeline": 2, "pipeline_schedule": "zbv"}, moe=SEQ),
    Case("shared experts", 2, {"pipeline": 2}, moe=GLOBAL, micro=2, fixed_micro=True, more=FULL),
    # capacity is that of a rank's micro-batch
    Case("shared experts", 2, {"expert": 2}, moe=PROBS, fixed_micro=True),
    Case(
        "shared experts",
        4,
        {"expert": 2, "data_replicate": 2},
        moe=POSITION,
        fixed_micro=True,
    ),
    Case(
        "shared experts",
        2,
        {"expert_tensor": 2},
        moe=PROBS,
        fixed_micro=True,
        more=FULL,
    ),
    Case("shared experts", 2, {"context": 2}, moe=SINKHORN, fixed_micro=True),
]


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.slow) if case.ranks > 2 else case for case in CASES], ids=str
)
def test_routers_are_trained_as_in_one_process(case: Case) -> None:
    assert find_deviations(case) == {}


def without_sums_over_the_batch(case: Case) -> Facts:
    """The ranks that share a micro-batch balance their own tokens."""
    router_training.build_sum = lambda *_: router_training.detach
    return collect_facts(case)


def without_padding(case: Case) -> Facts:
    """Padding counts as tokens."""
    router_training.mark_tokens = lambda *_: None
    return collect_facts(case)


@pytest.mark.parametrize("mutation", [without_sums_over_the_batch, without_padding])
def test_a_missing_sum_or_mask_is_noticed(mutation: Any) -> None:
    case = Case("corrected", 2, {"context": 2}, moe=SEQ)
    assert measure_mutation(mutation, case)["gradient"] > 1e-5
