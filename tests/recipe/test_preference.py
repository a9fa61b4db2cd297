"""The settings of preference training: which losses combine, and which settings have an effect with which loss."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import pytest

from litgpt.errors import UserError
from litgpt.recipe.align import Align, AlignKTO, AlignReward
from litgpt.recipe.build import Flag, build_recipe, collect_settings
from litgpt.recipe.preference import DPO, WITH_DIVERGENCE, LossType, PreferenceArgs
from litgpt.recipe.train import EvalArgs, LossArgs
from litgpt.recipe.tuner import IA3, LoRA

REQUIRED: dict[str, Any] = {"exo_pair": {"label_smoothing": 0.001}}


@dataclass(frozen=True)
class Recipe:
    """A recipe with one group."""

    preference: PreferenceArgs = field(default_factory=PreferenceArgs)


def parse(*flags: str) -> PreferenceArgs:
    settings = [Flag(*flag.split("=", 1)) for flag in flags]
    recipe: Recipe = build_recipe(Recipe, collect_settings(Recipe, [], settings))
    return recipe.preference


def test_one_loss_or_a_list_with_weights() -> None:
    assert parse("preference.loss_type=ipo").types == ("ipo",)
    both = parse("preference.loss_type=[sigmoid, sft]", "preference.loss_weights=[1, 0.5]")
    assert (both.types, both.weights, both.nll_weight) == (("sigmoid", "sft"), (1.0, 0.5), 0.5)
    with pytest.raises(UserError, match=r"loss_type: 'x' is not valid; use sigmoid or .* or reward or a list of these"):
        parse("preference.loss_type=x")
    for value, name in (("dpo", "sigmoid"), ("[sft, aot_pair]", "aot_unpaired")):
        with pytest.raises(UserError, match=rf"preference.loss_type: \w+ is not valid; did you mean {name}\?"):
            parse(f"preference.loss_type={value}")


@pytest.mark.parametrize("name", get_args(LossType))
def test_each_loss_is_valid_alone_and_only_those_of_dpo_in_lists(name: str) -> None:
    given = REQUIRED.get(name, {})
    assert PreferenceArgs(loss_type=name, **given).types == (name,)
    if name in DPO:
        assert PreferenceArgs(loss_type=["sigmoid", name], **given).needs_reference
    else:
        with pytest.raises(UserError, match=f"loss_type: {name} cannot be combined with other losses"):
            PreferenceArgs(loss_type=["sigmoid", name])


@pytest.mark.parametrize("name", get_args(LossType))
def test_a_divergence_is_accepted_where_rewards_are_compared(name: str) -> None:
    given = {"loss_type": name, "f_divergence_type": "js_divergence"} | REQUIRED.get(name, {})
    if name in WITH_DIVERGENCE:
        PreferenceArgs(**given)
    else:
        with pytest.raises(UserError, match=r"f_divergence_type: js_divergence (is not supported|has no effect) with"):
            PreferenceArgs(**given)


def test_defaults_that_depend_on_the_loss() -> None:
    assert PreferenceArgs().resolved_beta == 0.1
    assert PreferenceArgs(loss_type="simpo").resolved_beta == 2.0
    assert PreferenceArgs(loss_type="simpo", beta=2.5).resolved_beta == 2.5
    weights = {name: PreferenceArgs(loss_type=name).nll_weight for name in ("sigmoid", "orpo", "cpo", "simpo", "sft")}
    assert weights == {"sigmoid": 0.0, "orpo": 1.0, "cpo": 1.0, "simpo": 0.0, "sft": 1.0}
    assert PreferenceArgs(loss_type="simpo", cpo_alpha=0.3).nll_weight == 0.3
    assert PreferenceArgs(rpo_alpha=0.2).nll_weight == 0.2


@pytest.mark.parametrize(("name", "needed"), [("sigmoid", True), ("kto", True), ("sft", False), ("orpo", False)])
def test_which_losses_need_a_reference(name: str, needed: bool) -> None:
    assert PreferenceArgs(loss_type=name).needs_reference == needed
    assert not PreferenceArgs(reference_free=True).needs_reference


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss_type": []}, "loss_type: .* is empty; use sigmoid"),
        ({"loss_weights": [1.0, 2.0]}, "use 1, one for each of preference.loss_type: sigmoid"),
        ({"loss_weights": [0.0]}, "loss_weights: .* trains nothing"),
        ({"loss_type": "kto", "desirable_weight": 0.0, "undesirable_weight": 0.0}, "train nothing; set one to 1"),
        ({"beta": float("nan")}, "beta: nan is not valid"),
        ({"label_smoothing": 0.5}, "label_smoothing: 0.5 is not valid; use a number from 0 to 0.49"),
        ({"loss_type": "exo_pair"}, "label_smoothing: 0 is not valid with preference.loss_type: exo_pair.*set 0.001"),
        (
            {"loss_type": ["sigmoid", "sft"], "rpo_alpha": 1.0},
            "rpo_alpha: 1 and preference.loss_type: sft are the same",
        ),
        (
            {"f_divergence_type": "forward_kl", "reference_free": True},
            "preference.reference_free: true; use reverse_kl",
        ),
        ({"loss_type": "aot", "use_weighting": True}, "use_weighting: true is not supported with .*aot"),
        ({"sync_ref_model": True, "precompute_ref_log_probs": True}, "are mutually exclusive"),
        ({"loss_type": "hinge", "label_smoothing": 0.1}, "label_smoothing: 0.1 has no effect with .*: hinge"),
        ({"loss_type": "sft", "beta": 1.0}, "beta: 1.0 has no effect with preference.loss_type: sft"),
        ({"loss_type": "reward", "beta": 0.2}, "beta: 0.2 has no effect with preference.loss_type: reward"),
        ({"loss_type": "orpo", "rpo_alpha": 1.0}, "rpo_alpha: 1.0 has no effect with preference.loss_type: orpo"),
        ({"loss_type": "kto", "ld_alpha": 0.5}, "ld_alpha: 0.5 has no effect with preference.loss_type: kto"),
        ({"loss_type": "sft", "use_weighting": True}, "use_weighting: true has no effect"),
        ({"discopop_tau": 0.1}, "discopop_tau: 0.1 has no effect .* set preference.loss_type: discopop"),
        ({"simpo_gamma": 0.5}, "simpo_gamma: 0.5 has no effect .* set preference.loss_type: simpo"),
        ({"cpo_alpha": 0.5}, "cpo_alpha: 0.5 has no effect .* set preference.loss_type: cpo"),
        ({"undesirable_weight": 0.5}, "undesirable_weight: 0.5 has no effect .* set preference.loss_type: kto"),
        ({"center_rewards_coefficient": 0.01}, "center_rewards_coefficient: 0.01 has no effect .*: reward"),
        ({"f_alpha_divergence_coef": 0.2}, "set preference.f_divergence_type: alpha_divergence"),
        ({"loss_type": "simpo", "reference_offload": True}, "reference_offload: true has no effect with .*: simpo"),
        ({"reference_free": True, "sync_ref_model": True}, "sync_ref_model: true has no effect with .*reference_free"),
        ({"ref_model_sync_steps": 2}, "ref_model_sync_steps: 2 has no effect with preference.sync_ref_model: false"),
    ],
)
def test_contradictions_and_settings_without_effect_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        PreferenceArgs(**settings)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("eval.max_new_tokens: 5", {"eval": EvalArgs(max_new_tokens=5)}),
        ("eval.evaluate_example: random", {"eval": EvalArgs(evaluate_example="random")}),
        ("eval.sample_prompt: a", {"eval": EvalArgs(sample_prompt="a")}),
        ("loss.impl: plain", {"loss": LossArgs(impl="plain")}),
    ],
)
def test_settings_of_language_models_have_no_effect_on_reward_models(name: str, settings: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"{name} has no effect with preference.loss_type: reward"):
        AlignReward(Path("model"), **settings)


@pytest.mark.parametrize(("recipe", "loss"), [(AlignKTO, "kto"), (AlignReward, "reward")])
def test_commands_with_one_loss_refuse_others(recipe: type[Align], loss: str) -> None:
    assert recipe(Path("model")).preference.types == (loss,)
    with pytest.raises(UserError, match=f"loss_type: sigmoid is not the loss of this command, which is {loss}"):
        recipe(Path("model"), preference=PreferenceArgs())


def test_dropout_is_named_by_the_key_that_sets_it() -> None:
    model = Path("model")
    for recipe, expected in (
        (Align(model), {}),
        (Align(model, lora_dropout=0.05), {"lora_dropout": 0.05}),
        (Align(model, tuner=LoRA()), {}),
        (Align(model, tuner=LoRA(dropout=0.1)), {"tuner.dropout": 0.1}),
        (Align(model, tuner=IA3()), {}),
    ):
        assert recipe.list_dropout(recipe.resolved_tuner) == expected
    further = Align(model, initial_adapter_dir=Path("old"))
    assert further.list_dropout(LoRA(dropout=0.1)) == {"dropout of old": 0.1}
