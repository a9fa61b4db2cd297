"""Every layout trains like a single process, up to rounding in float64; mutations show that the test notices."""

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import Replicate

from litgpt.parallel import apply, collectives, tensor
from tests.layouts.layouts import Case, Facts, collect_facts, find_deviations, measure_mutation

CASES = [
    # data
    Case("dense", 2, {"data_replicate": 2}, packed=True),
    Case("tied", 2, {"data_shard": 2}),
    Case("deep", 4, {"data_replicate": 2, "reshard_after_forward": False}),
    # tensor
    Case("dense", 2, {"tensor": 2}, packed=True),
    Case("dense", 2, {"tensor": 2, "sequence": False}),
    Case("tied", 4, {"tensor": 2, "data_shard": 2}),
    Case("gemma", 2, {"tensor": 2}),
    Case("neox", 2, {"tensor": 2}),
    Case("learned", 2, {"tensor": 2}),
    Case("olmo2", 2, {"tensor": 2}),
    Case("head norms", 2, {"tensor": 2}),
    Case("one head", 2, {"tensor": 2, "sequence": False}, tuner="lora"),
    Case("dense", 2, {"tensor": 2}, tuner="lora"),
    # pipeline
    Case("deep", 2, {"pipeline": 2, "pipeline_schedule": "gpipe"}),
    Case("tied", 2, {"pipeline": 2}),
    Case("tied", 2, {"pipeline": 2, "pipeline_schedule": "zbv"}, tuner="lora"),
    Case("latent", 2, {"pipeline": 2}),
    Case("gemma", 2, {"pipeline": 2, "pipeline_layers": [1, 3]}, packed=True),
    Case("dense", 2, {"pipeline": 2}, tuner="lora and head"),
    Case("deep", 4, {"pipeline": 4, "pipeline_layers": [1, 3, 3, 1]}, micro=1),
    Case("deep", 4, {"pipeline": 4, "pipeline_schedule": "zbv"}, micro=1),
    Case(
        "deep", 4, {"pipeline": 2, "data_shard": 2, "pipeline_schedule": "interleaved", "reshard_after_forward": True}
    ),
    Case("moe", 4, {"pipeline": 2, "data_shard": 2, "pipeline_schedule": "zbv"}, micro=1),
    Case("one head", 2, {"tensor": 2}, tuner="lora", quantize="bnb.nf4-dq"),
    # two of pipeline, data, context, tensor and expert
    Case("tied", 4, {"pipeline": 2, "context": 2}, packed=True),
    Case("moe", 4, {"pipeline": 2, "data_shard": 2, "expert": 2}),
]
# most of their time is spent in DTensor's sharding propagation; their axes are above, on fewer ranks
SLOW = [
    Case("tied", 4, {"tensor": 2, "data_replicate": 2}),
    Case("one head", 4, {"tensor": 4}),
    Case("tied", 4, {"tensor": 2, "context": 2}, packed=True),
    Case("tied", 4, {"tensor": 2, "pipeline": 2}, tuner="lora"),
    Case("deep", 4, {"pipeline": 2, "data_replicate": 2}),
    Case("moe", 4, {"context": 2, "expert": 2}, packed=True),
    Case("latent", 4, {"tensor": 2, "context": 2, "expert": 2}),
    Case("shared experts", 8, {"pipeline": 2, "context": 2, "data_shard": 2, "expert": 4}, packed=True),
    Case("deep", 4, {"pipeline": 2, "tensor": 2, "pipeline_schedule": "zbv"}),
    Case("one head", 4, {"tensor": 4}, tuner="lora", quantize="bnb.nf4-dq"),
    Case("shared experts", 4, {"tensor": 2, "data_shard": 2, "expert": 2, "expert_tensor": 2}),
    Case("dense", 4, {"tensor": 2}, tuner="lora and head"),
    Case("gemma", 4, {"tensor": 2, "context": 2, "context_method": "ulysses"}, packed=True),
    Case("tied", 4, {"tensor": 2, "pipeline": 2}),
    Case("shared experts", 4, {"tensor": 2, "data_shard": 2, "expert": 4}),
    Case("latent", 4, {"tensor": 2, "data_shard": 2, "expert": 2}),
    Case("tied", 8, {"tensor": 2, "context": 2, "pipeline": 2, "pipeline_schedule": "interleaved"}, packed=True),
    Case("deep", 8, {"data_replicate": 2, "data_shard": 2, "pipeline": 2, "pipeline_schedule": "zbv"}),
    Case("moe", 8, {"pipeline": 2, "tensor": 2, "data_shard": 2, "expert": 2}, packed=True),
    Case("tied", 8, {"tensor": 2, "context": 2, "data_shard": 2}),
    Case("moe", 8, {"data_replicate": 2, "data_shard": 2, "tensor": 2, "expert": 4}),
]


@pytest.mark.parametrize("case", [*CASES, *(pytest.param(case, marks=pytest.mark.slow) for case in SLOW)], ids=str)
def test_layout_trains_as_one_process(case: Case) -> None:
    assert find_deviations(case) == {}


def without_partial_sums(case: Case) -> Facts:
    """Gradients of norms, which process some of the tokens, are not summed."""
    tensor.Partial = Replicate  # type: ignore[assignment, misc]
    return collect_facts(case)


def without_scattered_sums(case: Case) -> Facts:
    """Each rank takes its own chunk instead of the sum over ranks."""
    collectives.reduce_scatter_no_grad = collectives.slice_local
    return collect_facts(case)


def without_replica_sums(case: Case) -> Facts:
    """Gradients of replicas are not reduced."""

    def skip_reduction(_: object, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        future: torch.futures.Future[torch.Tensor] = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    apply._all_reduce_hook = skip_reduction
    return collect_facts(case)


MUTATIONS = {
    without_partial_sums: Case("dense", 2, {"tensor": 2}),
    without_scattered_sums: Case("dense", 2, {"tensor": 2}),
    without_replica_sums: Case("dense", 2, {"data_replicate": 2}),
}


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.__name__)
def test_a_missing_sum_is_noticed(mutation: Callable[[Case], Facts]) -> None:
    case = MUTATIONS[mutation]
    assert measure_mutation(mutation, case)["gradient"] > 1e-3
