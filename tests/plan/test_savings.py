"""Changes of one setting that save memory: those that are possible, and what they save."""

import json
from typing import Any

import pytest

from litgpt.cli import main
from litgpt.plan.savings import list_candidates, replace_setting
from litgpt.recipe.build import build_recipe
from litgpt.recipe.parallel import ParallelDims
from litgpt.recipe.pretrain import Pretrain
from tests.commands.test_plan import RUN


def build(**settings: Any) -> Pretrain:
    return build_recipe(Pretrain, {"model_name": "tiny", "out_dir": "out", **settings})


def test_the_changes_are_those_that_a_recipe_has_not_made() -> None:
    recipe = build(train={"micro_batch_size": 4}, loss={"impl": "plain"}, parallel={"zero": 2}, precision="bf16-mixed")
    assert list(list_candidates(recipe, ParallelDims(data_shard=2))) == [
        ("recompute.granularity", "full"),
        ("train.micro_batch_size", 2),
        ("parallel.zero", 3),
        ("loss.impl", "chunked"),
        ("precision", "bf16-true"),
    ]
    saved = build(train={"micro_batch_size": 1}, recompute={"granularity": "full"}, precision="bf16-true")
    assert list(list_candidates(saved, ParallelDims(data_replicate=2))) == [("parallel.data_replicate", 1)]


def test_modules_of_selective_recomputation_are_left_out_with_full() -> None:
    recipe = build(recompute={"granularity": "selective", "modules": ["mlp"]})
    changed = replace_setting(recipe, "recompute.granularity", "full")
    assert changed.recompute == build(recompute={"granularity": "full"}).recompute


def test_savings_are_what_a_plan_of_the_changed_recipe_needs(capsys: pytest.CaptureFixture[str]) -> None:
    run = [*RUN, "--loss.impl", "plain", "--train.micro_batch_size", "8", "--model_config.padded_vocab_size", "65536"]

    def plan(*argv: str) -> dict[str, Any]:
        assert main(["plan", *run, *argv, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    before = plan("--savings")
    best = before["savings"][0]
    assert (best["key"], best["value"]) == ("loss.impl", "chunked")
    after = plan(f"--{best['key']}", best["value"])["worst"]["peak_gib"]
    assert best["memory"] == pytest.approx(after, rel=1e-3)
    assert best["saved"] == pytest.approx(before["worst"]["peak_gib"] - after, rel=1e-2)
