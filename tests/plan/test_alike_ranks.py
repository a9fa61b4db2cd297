"""One of the ranks that are alike is planned, with as many micro-batches as make a difference to its memory."""

from pathlib import Path
from typing import Any

import pytest

from litgpt.errors import UserError
from litgpt.parallel.fake_group import fake_mesh
from litgpt.parallel.schedules import build_pipeline_schedule
from litgpt.plan.alike_ranks import Load, group_ranks, isolate_rank, measure_load
from litgpt.plan.build_spec import build_spec
from litgpt.plan.memory import plan_step_memory
from litgpt.plan.ranks import plan_run, resolve_run
from litgpt.recipe.build import build_recipe, collect_settings
from litgpt.recipe.pretrain import Pretrain
from tests.plan.test_memory import EXPERTS, PRETRAIN, TOKENS

RECIPE = Path(__file__).parents[2] / "config_hub/scale/deepseek-v3-1024-gpus.yaml"
LAYOUT: dict[str, Any] = {
    **{"precision": "bf16-mixed", "out_dir": "unused", "devices": 8, "num_nodes": 128},
    "model_config": EXPERTS | {"n_layer": 4},
    "parallel": {"pipeline": 4, "data_shard": 256, "expert": 4},
    "recompute": {"granularity": "full"},
    "train": {"micro_batch_size": 1, "global_batch_size": 256 * 8, "max_seq_length": TOKENS, "max_norm": 1.0},
}


def build(**changes: Any) -> Any:
    recipe = build_recipe(Pretrain, PRETRAIN | LAYOUT | changes)
    spec = build_spec("pretrain", recipe)
    return recipe, spec, resolve_run(recipe, spec)[1]


@pytest.mark.parametrize(
    ("schedule", "device", "load"),
    [("1f1b", 0, Load(4, 4)), ("1f1b", 3, Load(1, 1)), ("gpipe", 0, Load(8, 7))],
)
def test_a_device_holds_micro_batches_until_their_backward(schedule: str, device: int, load: Load) -> None:
    assert measure_load(build_pipeline_schedule(schedule, 4, 4, 8)[device]) == load


def test_stages_with_the_same_layers_are_planned_once() -> None:
    groups = group_ranks(*build())
    assert [(group.rank, group.devices, group.number) for group in groups] == [
        (0, (0,), 256),
        (256, (1, 2), 512),
        (768, (3,), 256),
    ]
    assert [group.micro_batches for group in groups] == [5, 4, 2]
    first, *rest = group_ranks(*build(parallel=LAYOUT["parallel"] | {"pipeline_schedule": "gpipe"}))
    assert first.micro_batches == 8 and len(rest) == 2
    uneven = LAYOUT["parallel"] | {"pipeline_layers": [1, 2, 2, 1]}
    assert len(group_ranks(*build(parallel=uneven, model_config=EXPERTS | {"n_layer": 6}))) == 3
    windows = {"n_layer": 4, "sliding_window_size": 16, "sliding_window_indices": [1, 0, 1, 0]}
    assert len(group_ranks(*build(model_config=EXPERTS | windows))) == 4


def test_any_rank_can_be_planned() -> None:
    recipe, spec, dims = build()
    alone = isolate_rank(recipe, spec, dims, 700)
    assert alone.devices == (2,) and alone.number == 1 and alone.micro_batches == 3
    with pytest.raises(UserError, match="rank: 1024 is not one of the 1024 ranks of the run; set at most 1023"):
        isolate_rank(recipe, spec, dims, 1024)


def test_the_stages_of_deepseek_v3_are_of_three_kinds() -> None:
    recipe = build_recipe(Pretrain, collect_settings(Pretrain, [str(RECIPE)], []))
    spec = build_spec("pretrain", recipe)
    groups = group_ranks(recipe, spec, resolve_run(recipe, spec)[1])
    assert [(group.rank, group.number, group.micro_batches) for group in groups] == [
        (0, 64, 17),
        (64, 896, 16),
        (960, 64, 2),
    ]


@pytest.mark.slow
def test_more_micro_batches_and_the_ranks_alike_need_no_more() -> None:
    recipe, spec, dims = build(model_config=EXPERTS | {"n_layer": 4, "n_embd": 256, "rotary_percentage": 0.25})
    planned = plan_run(recipe, spec).ranks
    for rank in planned:
        with fake_mesh(dims, rank) as mesh:
            whole = plan_step_memory(recipe, spec, mesh, length=TOKENS, steps=1000, micro_batches=8)
        # ids, positions and rotary embeddings of all micro-batches are prepared before the first one
        assert planned[rank].peak == pytest.approx(whole.peak, rel=0.02)
    alike = plan_run(recipe, spec, rank=512).ranks
    assert list(alike) == [512] and alike[512].peak < planned[256].peak
