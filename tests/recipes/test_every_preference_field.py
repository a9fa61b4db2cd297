"""Every field of the group `preference` has an effect: an unusual value changes a short run in the way named here."""

import functools
import json
import re
from pathlib import Path
from typing import Any

import pytest

from litgpt.recipe.align import Align
from tests.recipes.test_every_field import Row, base, list_leaves, train

pytestmark = pytest.mark.slow

__all__ = ["base"]
RATED, MOVING = "--preference.loss_type kto --data.sources rated.json", "--preference.sync_ref_model true"
ROWS: dict[str, Row] = {
    "loss_type": Row("hinge", "losses"),
    "loss_weights": Row("[2.0]", "losses"),
    "beta": Row("0.5", "losses"),
    "label_smoothing": Row("0.2", "losses"),
    "rpo_alpha": Row("1.0", "losses"),
    "reference_free": Row("true", "losses"),
    "f_divergence_type": Row("js_divergence", "losses"),
    "f_alpha_divergence_coef": Row("0.2", "losses", given="--preference.f_divergence_type alpha_divergence"),
    "ld_alpha": Row("0.5", "losses"),
    "use_weighting": Row("true", "losses"),
    "discopop_tau": Row("1.0", "losses", given="--preference.loss_type discopop"),
    "simpo_gamma": Row("0.5", "losses", given="--preference.loss_type simpo"),
    "cpo_alpha": Row("0.5", "losses", given="--preference.loss_type cpo"),
    "desirable_weight": Row("2.0", "losses", given=RATED),
    "undesirable_weight": Row("2.0", "losses", given=RATED),
    "center_rewards_coefficient": Row("0.5", "losses", given="--preference.loss_type reward"),
    "reference": Row("BASE/other/out/final", "losses"),
    "reference_offload": Row("true", "says", "preference.reference_offload: true has no effect with a model in host"),
    "precompute_ref_log_probs": Row("true", "operations"),
    "sync_ref_model": Row("true --preference.ref_model_sync_steps 1", "losses"),
    "ref_model_mixup_alpha": Row("0.1", "losses", given=f"{MOVING} --preference.ref_model_sync_steps 1"),
    "ref_model_sync_steps": Row("1", "losses", given=MOVING),
    "disable_dropout": Row("false", "losses", given="--lora_dropout 0.5"),
}
FLAGS = [
    *("--train.max_steps", "3", "--train.global_batch_size", "4", "--train.lr_warmup_steps", "1"),
    *("--train.save_interval", "null", "--train.max_seq_length", "256", "--eval.max_new_tokens", "null"),
    *("--precision", "32-true", "--optimizer.lr", "1e-2", "--data", "Preferences", "--data.sources", "pairs.json"),
    *("--data.prompt_style", "default", "--data.num_workers", "0", "--lora_mlp", "true", "--out_dir", "out"),
]


def align(folder: Path, base: Path, *flags: str) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    pairs = [{"prompt": f"Say {n}", "chosen": "There is. " * (n % 3 + 1), "rejected": "No, " * 5} for n in range(20)]
    rated = [{"prompt": row["prompt"], "completion": row["chosen"], "label": n % 2 == 0} for n, row in enumerate(pairs)]
    (folder / "pairs.json").write_text(json.dumps(pairs))
    (folder / "rated.json").write_text(json.dumps(rated))
    return train(folder, "align", str(base / "out/final"), *FLAGS, *flags)


@functools.cache
def usual_facts(base: Path, given: str) -> dict[str, Any]:
    """The facts of the run that a row is compared with."""
    return align(base / "usual" / re.sub(r"\W", "", f"align{given}"), base, *given.split())


def test_every_preference_field_has_a_row() -> None:
    fields = {key.removeprefix("preference.") for key in list_leaves(Align) if key.startswith("preference.")}
    assert fields == ROWS.keys()


@pytest.mark.parametrize("name", ROWS)
def test_a_field_has_an_effect(name: str, base: Path, tmp_path: Path) -> None:
    row = ROWS[name]
    flags = f"{row.given} --preference.{name} {row.value.replace('BASE', str(base))}".split()
    facts = align(tmp_path, base, *flags)
    assert facts["code"] == 0, facts["text"]
    if row.fact == "says":
        assert row.text in facts["text"]
        return
    usual = usual_facts(base, row.given)
    assert usual["code"] == 0, usual["text"]
    assert facts[row.fact] != usual[row.fact]
