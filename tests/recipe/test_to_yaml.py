"""A recipe in YAML loads as the same recipe."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from litgpt.recipe.build import build_recipe, merge_settings
from litgpt.recipe.from_yaml import parse_text
from litgpt.recipe.optimizer import Custom, Muon
from litgpt.recipe.pretrain import Pretrain, TokenizerArgs
from litgpt.recipe.to_yaml import dump_recipe, to_plain
from litgpt.recipe.train import CheckpointArgs, EvalArgs, LogArgs, TrainArgs


def reload(recipe: Any) -> Any:
    """Format a recipe as YAML and load it."""
    return build_recipe(
        type(recipe), merge_settings(type(recipe), {}, parse_text(dump_recipe(recipe), "dump"), trusted=True)
    )


@pytest.mark.parametrize(
    "recipe",
    [
        Pretrain("x"),
        Pretrain("x", resume=True),
        Pretrain("x", resume=Path("out/step-1"), out_dir=Path("a b/ü")),
        Pretrain("x", model_config={"n_layer": 2, "rope_adjustments": {"factor": 8.0}, "hf_config": {}}),
        Pretrain("x", optimizer=Muon(lr=1e-5, adamw_lr=3e-20), train=TrainArgs(min_lr=1e-7, lr_decay_style="wsd")),
        Pretrain(
            "x", optimizer=Custom(lr=1e-3, path="torch.optim.Adam", arguments={"betas": [0.9, 0.95], "eps": 1e-5})
        ),
        Pretrain("x", devices=2, num_nodes=2, compile=False, tokenizer=TokenizerArgs("bytes"), precision="64-true"),
        Pretrain("x", checkpoint=CheckpointArgs(asynchronous=False), log=LogArgs(run="yes", group="1e5")),
    ],
)
def test_a_recipe_loads_as_equal(recipe):
    assert reload(recipe) == recipe


TEXTS = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"])).filter(lambda text: text != "null")


@settings(max_examples=40, deadline=None)
@given(text=TEXTS, number=st.floats(1e-12, 1.0))
def test_any_text_and_number_loads_as_equal(text, number):
    train = TrainArgs(min_lr=number * 1e-3, max_norm=number)
    recipe = Pretrain("x", eval=EvalArgs(sample_prompt=text), train=train)
    assert reload(recipe) == recipe


@pytest.mark.parametrize("text", ["true", "1e5", "[1]", "{a: 1}", "007", "", " ", "'", "a: b", "a\nb"])
def test_texts_that_look_like_something_else(text):
    recipe = Pretrain("x", eval=EvalArgs(sample_prompt=text))
    assert reload(recipe) == recipe


def test_the_text_null_is_none() -> None:
    """As on a command line, where it has no quotes."""
    assert reload(Pretrain("x", eval=EvalArgs(sample_prompt="null"))).eval.sample_prompt is None


def test_a_url_keeps_its_slashes() -> None:
    assert to_plain({"dir": Path("s3://bucket/model"), "other": Path("out//s3")}) == {
        "dir": "s3://bucket/model",
        "other": "out/s3",
    }


def test_secrets_are_omitted():
    @dataclass
    class Fetch:
        repo: str
        access_token: str | None = None

    assert yaml.safe_load(dump_recipe(Fetch("a", access_token="hf_secret"))) == {"repo": "a"}
