"""A search finds legal layouts that fit, and plans of a few layers agree with those of the whole model."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from litgpt import cli
from litgpt.parallel.schedules import SCHEDULES
from litgpt.plan.build_spec import build_spec
from litgpt.plan.layout_guess import RunFigures, guess_memory, guess_seconds
from litgpt.plan.layout_options import LayoutOption, describe_recomputation, list_legal_layouts, split_gpus
from litgpt.plan.ranks import plan_run
from litgpt.plan.repeated_layers import Estimate, estimate_run, find_repetition, read_plan
from litgpt.plan.search import LayoutSearch, search_layouts
from litgpt.plan.search_table import format_search
from litgpt.recipe.build import build_recipe, merge_settings
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
    "some-recomputed": {"devices": 2, "recompute": {"granularity": "full", "method": "block", "num_layers": 3}},
    "segments": {"devices": 1, "recompute": {"granularity": "full", "num_layers": 2}},
    "context": {"devices": 2, "parallel": {"context": 2}},
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


def list_layouts(gpus: int = 8, **changes: Any) -> tuple[list[LayoutOption], Counter[str]]:
    settings = {"train": TRAIN | {"global_batch_size": 16}} | changes
    recipe, spec = build_case(Case("pretrain", PRETRAIN | DEEP | settings))
    refused: Counter[str] = Counter()
    return list(list_legal_layouts(recipe, spec, gpus, refused)), refused


def test_layouts_are_those_that_the_recipe_allows() -> None:
    layouts, refused = list_layouts()
    assert any("train.global_batch_size: 16 is not divisible" in reason for reason in refused)
    assert any("parallel.tensor: 8 does not divide" in reason for reason in refused)  # of 4 heads
    settings = [layout.base.parallel for layout in layouts]
    assert {parallel.tensor for parallel in settings} == {1, 2, 4}
    assert {parallel.pipeline for parallel in settings} == {parallel.context for parallel in settings} == {1, 2, 4, 8}
    assert {parallel.sequence for parallel in settings} == {True, False}
    assert {parallel.pipeline_schedule for parallel in settings if parallel.pipeline == 2} == set(SCHEDULES)
    assert {parallel.zero for parallel in settings} == {None, 1, 2, 3}
    recomputed = {describe_recomputation(layout.recompute) for layout in layouts if layout.dims.pipeline == 1}
    modules = {"norms and activation", "mlp"}
    layers = {"2 layers of a stage", "4 layers of a stage", "6 layers of a stage", "full by 2 layers"}
    assert recomputed == {"none", "full"} | modules | layers
    experts, _ = list_layouts(model_config=EXPERTS | {"n_layer": 8})
    assert {layout.dims.expert for layout in experts} == {1, 2, 4}
    assert {"moe"} <= {describe_recomputation(layout.recompute) for layout in experts}


def test_written_settings_replace_those_of_the_recipe() -> None:
    parallel = {"pipeline": 2, "pipeline_schedule": "interleaved", "tensor": 2, "context": 2, "context_method": "ring"}
    changes = {
        "parallel": parallel,
        "recompute": {"granularity": "full", "method": "block", "num_layers": 3},
        "loss": {"impl": "plain"},
        "devices": 8,
    }
    layouts, _ = list_layouts(**changes)
    assert {layout.loss.impl for layout in layouts} == {"chunked", "plain"}
    given = {"precision": "bf16-mixed", "out_dir": "unused"} | PRETRAIN | DEEP | changes
    for layout in layouts[:: len(layouts) // 40]:
        train = TRAIN | {"global_batch_size": 16}
        tree = merge_settings(Pretrain, given | {"train": train}, layout.as_tree(), trusted=True)
        again = build_recipe(Pretrain, tree)
        assert again.parallel == layout.recipe.parallel and again.recompute == layout.recipe.recompute
        assert again.loss == layout.recipe.loss and again.train == layout.recipe.train


def guess(layout: LayoutOption) -> Estimate:
    spec = build_spec("pretrain", layout.given)
    fast = replace(GPU, link_bandwidth=1e6, network_bandwidth=1e6)
    figures = RunFigures.of_run(layout.given, spec, fast, layout.length)
    return Estimate(guess_memory(layout, figures), guess_seconds(layout, figures))


def test_guesses_order_settings_as_they_are_known_to_be() -> None:
    layouts, _ = list_layouts(loss={"impl": "plain"})

    def find(recompute: str = "none", loss: str = "plain", **axes: Any) -> Estimate:
        wanted = {"data_shard": 8} | axes
        return guess(
            next(
                layout
                for layout in layouts
                if layout.axes == wanted
                and (describe_recomputation(layout.recompute), layout.loss.impl) == (recompute, loss)
                and layout.base.train.micro_batch_size == 1
            )
        )

    whole, plain = find(zero=2), find(zero=3)
    assert plain.memory < whole.memory
    assert find("full", zero=3).memory < find("4 layers of a stage", zero=3).memory < plain.memory
    assert find("full", zero=3).seconds > find("4 layers of a stage", zero=3).seconds > plain.seconds
    assert find(loss="chunked", zero=3).memory < plain.memory
    assert find(context=2, data_shard=4, zero=3).memory < plain.memory
    stages = {"pipeline": 4, "data_shard": 2, "zero": 1}
    gpipe, interleaved = (find(pipeline_schedule=name, **stages) for name in ("gpipe", "interleaved"))
    assert find(**stages).memory < gpipe.memory and find(**stages).seconds == gpipe.seconds
    assert interleaved.seconds < gpipe.seconds
    split = {"tensor": 2, "data_shard": 4, "zero": 3}
    assert find(**split).memory < find(sequence=False, **split).memory


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


def test_layouts_that_others_exclude_are_not_planned() -> None:
    layouts, _ = list_layouts()
    full, plain = (
        next(
            x for x in layouts if x.axes == {"data_shard": 8, "zero": 3} and describe_recomputation(x.recompute) == name
        )
        for name in ("full", "none")
    )
    search = LayoutSearch(80)
    search.add(plain, Estimate(100, 1.0), Estimate(90, 1.0))
    assert "does not fit" in str(search.explain_skip(full, Estimate(105, 1.5), 1))
    assert search.explain_skip(full, Estimate(60, 1.5), 1) is None
    search.add(full, Estimate(60, 1.5), Estimate(50, 1.5))
    assert "as fast" in str(search.explain_skip(full, Estimate(70, 1.5), 1))
    assert search.explain_skip(full, Estimate(70, 1.4), 1) is None
    assert "states do not fit" in str(search.explain_skip(full, Estimate(70, 1.4), 81))


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
    assert seconds == sorted(seconds) and len(seconds) == 6
    assert cli.main(["plan", *run, "--config", str(file), "--gpu", "RTX-4090", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["processes"] == 2 and shown["fits"]
    assert shown["worst"]["peak_gib"] == pytest.approx(found["fits"][0]["peak_gib"], rel=0.01)
    assert shown["step"]["seconds"] == pytest.approx(seconds[0], rel=0.01)
