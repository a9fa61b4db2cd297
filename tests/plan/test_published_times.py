"""Estimated times of published runs, all with the same efficiencies, and the order of pairs of them."""

from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import pytest

from litgpt.plan.build_spec import build_spec
from litgpt.plan.ranks import plan_run
from litgpt.plan.run_time import RunTime
from litgpt.recipe.build import build_recipe, merge_settings
from litgpt.recipe.commands import COMMANDS
from litgpt.recipe.gpu import Gpu, build_gpu

A800, H100 = build_gpu("A800-80GB"), build_gpu("H100-80GB")
# 96 GB of HBM2e and 500 W; its peak, by the source, is between those of SXM and NVL
TITAN_H100 = replace(H100, memory=94.5, memory_bandwidth=2400, bf16_tflops=912)


class Published(NamedTuple):
    """A published run, and the recipe that is most like it.

    Attributes:
        seconds: of a step.
        settings: of the recipe, whose model has some layers only.
        layers: of the whole model by those of the recipe.
    """

    seconds: float
    gpu: Gpu
    command: str
    settings: dict[str, Any]
    layers: int


def train(length: int, micro: int, total: int) -> dict[str, Any]:
    return {"max_seq_length": length, "micro_batch_size": micro, "global_batch_size": total}


SWIFT = {"model_name": "Qwen2.5-14B", "devices": 8, "train": train(8192, 1, 16)}
TITAN = {"model_name": "Llama-3.1-8B", "devices": 8, "train": train(8192, 2, 16)}
# recomputes every second product; here, every second layer
TITAN_RECOMPUTE = {"granularity": "full", "method": "block", "num_layers": 1}
# packed rows of 8,192 tokens. Megatron's kernels are fused, those of transformers with DeepSpeed are not.
RUNS = {
    "megatron-swift-14b": Published(
        *(9.04, A800, "pretrain"),
        SWIFT | {"parallel": {"tensor": 4, "zero": 2}, "recompute": {"granularity": "selective"}},
        layers=48,
    ),
    "deepspeed-zero3-14b": Published(
        *(10.56, A800, "pretrain"),
        SWIFT | {"parallel": {"zero": 3}, "recompute": {"granularity": "full"}, "compile": False},
        layers=48,
    ),
    "deepspeed-zero2-14b": Published(
        *(10.32, A800, "pretrain"),
        SWIFT | {"parallel": {"zero": 2}, "recompute": {"granularity": "full"}, "compile": False},
        layers=48,
    ),
    "torchtitan-8b": Published(
        *(2 * 8192 / 6667, TITAN_H100, "pretrain"), TITAN | {"recompute": TITAN_RECOMPUTE}, layers=16
    ),
    "torchtitan-8b-eager": Published(
        *(2 * 8192 / 5762, TITAN_H100, "pretrain"),
        TITAN | {"recompute": TITAN_RECOMPUTE, "compile": False},
        layers=16,
    ),
    # the table names no optimized kernels for this row
    "automodel-8b-lora": Published(
        *(32 * 4096 / 12473, H100, "finetune_lora"),
        {"checkpoint_dir": "meta-llama/Llama-3.1-8B", "devices": 1, "precision": "bf16-true", "compile": False}
        | {"train": train(4096, 2, 32)},
        layers=32,
    ),
}
PAIRS = [
    ("megatron-swift-14b", "deepspeed-zero2-14b"),
    ("megatron-swift-14b", "deepspeed-zero3-14b"),
    ("deepspeed-zero2-14b", "deepspeed-zero3-14b"),
    ("torchtitan-8b", "torchtitan-8b-eager"),
]
"""Runs of the same work, the faster one first."""


def estimate(run: Published, units: int) -> RunTime:
    """The time of a run with a model of one or two units of layers."""
    settings = {"precision": "bf16-mixed", "out_dir": "unused"} | run.settings
    recompute = settings.get("recompute", {})
    unit = 2 if "num_layers" in recompute else 1
    if unit == 2:
        settings["recompute"] = recompute | {"num_layers": units}
    recipe_class = COMMANDS[run.command].import_recipe()
    recipe = build_recipe(recipe_class, merge_settings(recipe_class, {}, settings, trusted=True))
    spec = build_spec(run.command, recipe)
    spec = replace(spec, config=replace(spec.config, n_layer=units * unit))
    time = plan_run(recipe, spec, run.gpu).time
    assert time is not None
    return time


@cache
def estimate_whole(name: str) -> float:
    """Seconds of a step of the whole model, whose layers take as long as each other."""
    one, two = (estimate(RUNS[name], units).seconds for units in (1, 2))
    return one + (RUNS[name].layers - 1) * (two - one)


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_times_are_near_published_ones(name: str) -> None:
    assert estimate_whole(name) == pytest.approx(RUNS[name].seconds, rel=0.25)


@pytest.mark.slow
def test_pairs_of_runs_are_in_the_published_order() -> None:
    for faster, slower in PAIRS:
        assert RUNS[faster].seconds < RUNS[slower].seconds
        assert estimate_whole(faster) < estimate_whole(slower), (faster, slower)
