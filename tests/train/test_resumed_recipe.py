"""What has changed in a recipe since the checkpoint that a run resumes from is named, or refused."""

from pathlib import Path
from typing import Any

import pytest

from litgpt.errors import UserError
from litgpt.recipe.align import Align
from litgpt.recipe.to_yaml import dump_recipe
from litgpt.train.resumed_recipe import describe_changes

ALIGN = ("align", "model", "--data=Preferences", "--data.sources=pairs.jsonl")


@pytest.fixture
def saved(tmp_path: Path, litgpt: Any) -> Path:
    """A checkpoint of a run with default settings."""
    (tmp_path / "recipe.yaml").write_text(dump_recipe(build(litgpt)))
    return tmp_path


def build(litgpt: Any, *flags: str) -> Align:
    """The recipe of a run that resumes."""
    recipe: Align = litgpt(*ALIGN, *flags).recipe
    return recipe


@pytest.mark.parametrize(
    ("flags", "changes"),
    [
        ((), ""),
        (("--resume=auto",), ""),
        (
            ("--preference.loss_type=[ipo, sft]", "--preference.beta=0.3", "--preference.loss_weights=[1, 2]"),
            'preference.loss_type: sigmoid -> ["ipo", "sft"], preference.loss_weights: null -> [1.0, 2.0], '
            "preference.beta: null -> 0.3",
        ),
        (("--preference.sync_ref_model=true",), "preference.sync_ref_model: false -> true"),
        (("--train.max_steps=7", "--train.epochs=null"), "train.epochs: 1 -> null, train.max_steps: null -> 7"),
        (("--data.packing.enabled=true",), "data.packing.enabled: false -> true"),
        (("--optimizer=SGD", "--optimizer.lr=0.1"), "train.min_lr: 5e-06 -> 6e-05, optimizer: AdamW -> SGD"),
        (("--checkpoint.best.metric=val_loss",), 'checkpoint.best: null -> {"metric": "val_loss", "mode": null}'),
    ],
)
def test_changes_are_named(saved: Path, litgpt: Any, flags: tuple[str, ...], changes: str) -> None:
    assert describe_changes(build(litgpt, *flags), saved) == changes


def test_another_reference_is_refused(saved: Path, litgpt: Any) -> None:
    with pytest.raises(UserError, match=r"preference\.reference: other is not the null of .*; set .*: null, or start"):
        describe_changes(build(litgpt, "--preference.reference=other"), saved)


def test_a_checkpoint_without_a_recipe_has_no_changes(tmp_path: Path, litgpt: Any) -> None:
    assert describe_changes(build(litgpt), tmp_path) == ""


def test_settings_that_the_optimizer_state_depends_on_need_a_new_state(tmp_path: Path, litgpt: Any) -> None:
    galore = "--optimizer={class_path: GaLore, init_args: {lr: 1e-4, rank: %d}}"
    (tmp_path / "recipe.yaml").write_text(dump_recipe(build(litgpt, galore % 4)))
    assert (
        describe_changes(build(litgpt, galore % 4, "--optimizer.scale=0.5"), tmp_path) == "optimizer.scale: 1.0 -> 0.5"
    )
    with pytest.raises(UserError, match=r"optimizer.rank: 8 .* 4 .*; set optimizer.rank: 4, or checkpoint.load_opt"):
        describe_changes(build(litgpt, galore % 8), tmp_path)
    changes = describe_changes(build(litgpt, galore % 8, "--checkpoint.load_optimizer=false"), tmp_path)
    assert changes == "optimizer.rank: 4 -> 8, checkpoint.load_optimizer: true -> false"
