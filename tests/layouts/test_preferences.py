"""The objectives of preferences in every layout: loss, gradients, metrics and trained weights of a single process."""

import pytest

from tests.layouts.layouts import Case, find_deviations

CASES = [
    Case("dense", objective="dpo", micro=1, packed=True),
    Case("dense", objective="kto", micro=4),
    Case("dense", 2, {"data_replicate": 2}, objective="kto", packed=True),
    Case("tied", 2, {"data_shard": 2}, objective="dpo"),
    Case("tied", 2, {"tensor": 2}, objective="dpo", packed=True),
    Case("tied", 2, {"context": 2}, objective="dpo", packed=True),
    Case("tied", 2, {"pipeline": 2}, objective="dpo"),
    Case("scores", 2, {"data_shard": 2}, objective="reward", packed=True),
    Case("scores", 2, {"tensor": 2, "sequence": False}, objective="reward", tuner="lora and scores"),
    Case("scores", 2, {"pipeline": 2}, objective="reward", micro=1),
    Case("tied", 2, {"pipeline": 2, "pipeline_schedule": "zbv"}, objective="kto", packed=True, tuner="lora"),
    Case("moe", 2, {"expert": 2}, objective="ipo", packed=True),
]
SLOW = [
    Case("tied", 2, {"context": 2}, objective="kto"),
    Case("scores", 2, {"context": 2}, objective="reward", packed=True),
    Case("dense", 2, {"data_replicate": 2}, objective="dpo"),
    Case("tied", 2, {"data_shard": 2, "zero": 1}, objective="dpo", micro=1),
    Case("tied", 2, {"pipeline": 2, "pipeline_schedule": "zbv"}, objective="dpo", packed=True),
    Case("shared experts", 2, {"expert": 2}, objective="dpo", tuner="lora on experts", packed=True),
    Case("moe", 4, {"data_shard": 4, "expert": 2}, objective="dpo"),
    Case("scores", 4, {"tensor": 2, "context": 2}, objective="reward"),
    Case("scores", 4, {"pipeline": 2, "data_shard": 2}, objective="reward", tuner="lora and scores"),
    Case("deep", 2, {"pipeline": 2, "pipeline_schedule": "zbv"}, objective="dpo", tuner="lora and head"),
    Case("tied", 4, {"tensor": 2, "context": 2}, objective="dpo", packed=True),
    Case("tied", 4, {"tensor": 2, "data_shard": 2}, objective="simpo"),
    Case("tied", 4, {"pipeline": 2, "context": 2}, objective="kto", packed=True),
    Case("deep", 4, {"pipeline": 2, "data_shard": 2}, objective="dpo"),
    Case("tied", 4, {"tensor": 2, "pipeline": 2}, objective="kto", tuner="lora"),
    Case("moe", 4, {"context": 2, "expert": 2}, objective="ipo", packed=True),
    Case("gemma", 4, {"tensor": 2, "context": 2, "context_method": "ulysses"}, objective="dpo", packed=True),
    Case("one head", 2, {"tensor": 2}, objective="dpo", tuner="lora", quantize="bnb.nf4-dq"),
]


@pytest.mark.parametrize("case", [*CASES, *(pytest.param(case, marks=pytest.mark.slow) for case in SLOW)], ids=str)
def test_layout_trains_on_preferences_as_one_process(case: Case) -> None:
    assert find_deviations(case) == {}
