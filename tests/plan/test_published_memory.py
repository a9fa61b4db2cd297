"""Planned memory of published runs, all with the same allowance."""

from dataclasses import replace
from statistics import median
from typing import Any, NamedTuple

import pytest

from litgpt.plan.build_spec import build_spec
from litgpt.plan.memory import StepMemory
from litgpt.plan.ranks import plan_run
from litgpt.plan.table import compute_total
from litgpt.recipe.build import build_recipe
from litgpt.recipe.pretrain import Pretrain


class Published(NamedTuple):
    """A published run, and the recipe that is most like it.

    Attributes:
        memory: of the rank that needs the most, in GiB or, where the source says so, GB.
        layers: of the whole model.
        planned: the numbers of layers of two models, from whose memory that of the whole model follows.
    """

    memory: float
    settings: dict[str, Any]
    layers: int
    planned: tuple[int, int] = (2, 3)


def train(length: int, micro: int, total: int) -> dict[str, Any]:
    return {"max_seq_length": length, "micro_batch_size": micro, "global_batch_size": total}


SWIFT = {"model_name": "Qwen2.5-14B", "devices": 8, "train": train(8192, 1, 16)}
EXPERTS = {"model_name": "Qwen3-30B-A3B"}
FULL, PLAIN = {"granularity": "full"}, {"impl": "plain"}
RUNS = {
    "megatron-swift-14b": Published(
        64, SWIFT | {"parallel": {"tensor": 4, "zero": 2}, "recompute": {"granularity": "selective"}}, layers=48
    ),
    "deepspeed-zero2-14b": Published(
        80, SWIFT | {"parallel": {"zero": 2}, "recompute": FULL, "loss": PLAIN}, layers=48
    ),
    "deepspeed-zero3-14b": Published(
        58, SWIFT | {"parallel": {"zero": 3}, "recompute": FULL, "loss": PLAIN}, layers=48
    ),
    "megatron-swift-30b-a3b": Published(
        60,
        EXPERTS
        | {"devices": 16, "train": train(8192, 1, 16), "parallel": {"pipeline": 2, "expert": 8}}
        | {"recompute": FULL, "loss": PLAIN},
        layers=48,
        planned=(4, 6),
    ),
    # the recipe of its time, with FP8: half of the products are recomputed there, and half of the layers here
    "torchtitan-8b-float8": Published(
        77,
        {"model_name": "Llama-3.1-8B", "devices": 8, "train": train(8192, 2, 16)}
        | {"recompute": FULL | {"method": "block"}, "fp8": {"recipe": "tensorwise", "param_gather": True}},
        layers=32,
        planned=(4, 6),
    ),
}


def plan_layers(run: Published, layers: int) -> StepMemory:
    """The memory of the worst rank of a run with a model of some layers."""
    settings = {"precision": "bf16-mixed", "out_dir": "unused"} | run.settings
    if settings["recompute"].get("method") == "block":
        settings["recompute"] = settings["recompute"] | {"num_layers": layers // 2}
    recipe = build_recipe(Pretrain, settings)
    spec = build_spec("pretrain", recipe)
    plan = plan_run(recipe, replace(spec, config=replace(spec.config, n_layer=layers)))
    return plan.ranks[plan.worst]


def plan_whole(run: Published) -> float:
    """GiB of the whole model, whose layers need as much as each other."""
    first, second = (plan_layers(run, layers) for layers in run.planned)
    more = (second.peak - first.peak) * (run.layers - run.planned[0]) // (run.planned[1] - run.planned[0])
    return compute_total(replace(first, peak=first.peak + more))


@pytest.mark.slow
def test_memory_is_near_that_of_published_runs() -> None:
    differences = {name: plan_whole(run) / run.memory - 1 for name, run in RUNS.items()}
    assert max(map(abs, differences.values())) <= 0.15, differences
    assert median(map(abs, differences.values())) <= 0.10, differences
