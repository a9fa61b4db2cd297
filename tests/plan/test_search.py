"""A search finds legal layouts that fit, and plans of a few layers agree with those of the whole model."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from litgpt import cli
from litgpt.plan.ranks import plan_run, resolve_run
from litgpt.plan.repeated_layers import estimate_run, find_repetition, read_plan
from litgpt.plan.search import SearchResult, list_legal_layouts, search_layouts, split_gpus
from litgpt.plan.search_table import format_search
from litgpt.recipe.build import build_recipe
from litgpt.recipe.gpu import build_gpu
from litgpt.recipe.pretrain import Pretrain
from tests.plan.test_memory import EXPERTS, PRETRAIN, SHAPE, TRAIN, Case, build_case

GPU = build_gpu("A100-80GB")
DEEP = {"model_config": SHAPE | {"n_layer": 8}, "precision": "bf16-mixed"}
CASES: dict[str, dict[str, Any]] = {
    "one": {"devices": 1},
    "zero-3": {"devices": 2},
    "tensor": {"devices": 2, "parallel": {"tensor": 2}, "recompute": {"granularity": "full"}},
    "pipeline": {"devices": 2, "parallel": {"pipeline": 2, "pipeline_layers": [4, 4]}},
    "experts": {"model_config": EXPERTS | {"n_layer": 8}},
}


@pytest.mark.parametrize(
    ("kinds", "repetition"),
    [
        ("aaaa", (0, 1)),
        ("abab", (0, 2)),
        ("abbbb", (1, 1)),
        ("xabab", (1, 2)),
        ("abcd", (0, 4)),
        ("a", (0, 1)),
    ],
)
def test_the_layers_that_repeat_are_found(kinds: str, repetition: tuple[int, int]) -> None:
    assert find_repetition(kinds) == repetition


def check_estimate(settings: dict[str, Any]) -> None:
    recipe, spec = build_case(
        Case("pretrain", PRETRAIN | DEEP | {"train": TRAIN | {"global_batch_size": 8}} | settings)
    )
    whole = read_plan(plan_run(recipe, spec, GPU))
    if recipe.parallel.pipeline > 1:  # a list is planned as a whole
        recipe = replace(recipe, parallel=replace(recipe.parallel, pipeline_layers="auto"))
    estimate = estimate_run(recipe, spec, GPU)
    assert estimate.memory == pytest.approx(whole.memory, rel=0.01)
    assert estimate.seconds == pytest.approx(whole.seconds, rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_plans_of_few_layers_of_a_layout_are_extrapolated(name: str) -> None:
    check_estimate(CASES[name])


def test_layouts_are_those_that_the_recipe_allows() -> None:
    recipe, spec = build_case(Case("pretrain", PRETRAIN | DEEP | {"train": TRAIN | {"global_batch_size": 16}}))
    result = SearchResult()
    layouts = list(list_legal_layouts(recipe, spec, GPU, 8, result))
    assert len(layouts) == result.legal > 50 and sum(result.refused.values()) > 10
    assert any("train.global_batch_size: 16 is not divisible" in reason for reason in result.refused)
    assert any("parallel.tensor: 8 does not divide" in reason for reason in result.refused)  # of 4 heads
    assert {layout.recipe.parallel.tensor for layout in layouts} == {1, 2, 4}
    assert {layout.recipe.parallel.pipeline for layout in layouts} == {1, 2, 4, 8}
    for layout in layouts[:: len(layouts) // 3]:
        settings = layout.as_tree()
        train = TRAIN | {"global_batch_size": 16} | settings.pop("train")
        tree = {"out_dir": "unused", "precision": "bf16-mixed", "train": train}
        again = build_recipe(Pretrain, PRETRAIN | DEEP | tree | settings)
        assert resolve_run(again, spec)[1].world_size == 8
        assert again.parallel == layout.recipe.parallel and again.recompute == layout.recipe.recompute
    shard, whole = (next(x for x in layouts if x.parallel == {"data_shard": 8, "zero": zero}) for zero in (3, 2))
    assert shard.states == whole.states and shard.guess.memory < whole.guess.memory


def test_nodes_have_eight_gpus() -> None:
    assert split_gpus(4) == (4, 1) and split_gpus(64) == (8, 8)
    with pytest.raises(Exception, match="gpus: 12 is not a multiple of the 8 GPUs of a node; set 8"):
        split_gpus(12)


def test_nothing_is_planned_that_cannot_fit() -> None:
    recipe, spec = build_case(Case("pretrain", PRETRAIN | DEEP))
    result = search_layouts(recipe, spec, replace(GPU, memory=0.1), 2)
    assert not result.fitting and not result.too_large
    assert sum(result.skipped.values()) == result.legal
    assert "by a rough guess they do not fit" in format_search(result, "2 x GPU", 0.1)


@pytest.mark.slow
def test_the_fastest_layout_is_written_and_fits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = [
        "--model_name",
        "pythia-14m",
        "--out_dir",
        "out",
        "--train.max_seq_length",
        "128",
        "--precision",
        "bf16-mixed",
    ]
    run += ["--train.global_batch_size", "8", "--model_config.n_layer", "4"]
    file = tmp_path / "layout.yaml"
    search = ["--gpu", "RTX-4090", "--search", "--gpus", "2", "--layout_file", str(file), "--json"]
    assert cli.main(["plan", *run, *search]) == 0
    found = json.loads(capsys.readouterr().out)
    seconds = [layout["seconds"] for layout in found["fits"]]
    assert seconds == sorted(seconds) and len(seconds) == 4
    assert cli.main(["plan", *run, "--config", str(file), "--gpu", "RTX-4090", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["processes"] == 2 and shown["fits"]
    assert shown["worst"]["peak_gib"] == pytest.approx(found["fits"][0]["peak_gib"], rel=0.01)
    assert shown["step"]["seconds"] == pytest.approx(seconds[0], rel=0.01)
