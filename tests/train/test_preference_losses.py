"""The losses of pairs: frozen numbers, values where policy and reference are equal, and gradients."""

import math
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from litgpt.recipe.preference import WITH_DIVERGENCE, WITH_REFERENCE, LossType, PreferenceArgs
from litgpt.train.preference_losses import PAIR_LOSSES, PairScores, compute_pair_losses, compute_rewards

COLUMNS = {
    "chosen": [-12.0, -30.5, -4.2, -21.0],
    "rejected": [-15.5, -28.0, -9.0, -20.0],
    "reference_chosen": [-13.5, -29.0, -4.0, -26.0],
    "reference_rejected": [-14.0, -30.0, -9.5, -19.0],
    "chosen_length": [6.0, 14.0, 3.0, 11.0],
    "rejected_length": [8.0, 12.0, 5.0, 9.0],
}
# From `DPOTrainer._compute_loss`, `CPOTrainer.cpo_loss` and `ORPOTrainer.odds_ratio_loss` of TRL 1.16, which
# tests/parity/test_trl.py calls again; for the losses that sort pairs, the mean.
GOLDEN: list[tuple[dict[str, Any], list[float]]] = [
    ({"loss_type": "sigmoid"}, [0.554355, 0.883382, 0.72876, 0.437488]),
    ({"loss_type": "sigmoid_norm"}, [0.671511, 0.706931, 0.701515, 0.665264]),
    ({"loss_type": "hinge"}, [0.7, 1.35, 1.07, 0.4]),
    ({"loss_type": "ipo"}, [20.816406, 27.813066, 26.694443, 19.663401]),
    ({"loss_type": "exo_pair", "label_smoothing": 0.001}, [2.258199, 3.374558, 2.882662, 1.798271]),
    ({"loss_type": "nca_pair"}, [1.316914, 1.480505, 1.404026, 1.283314]),
    ({"loss_type": "robust", "label_smoothing": 0.1}, [0.516855, 0.927132, 0.73751, 0.362488]),
    ({"loss_type": "bco_pair"}, [1.241914, 1.569096, 1.421657, 1.118474]),
    ({"loss_type": "sppo_hard"}, [24.5, 91.25, 57.29, 16.0]),
    ({"loss_type": "aot"}, [0.642226]),
    ({"loss_type": "aot_unpaired"}, [0.636461]),
    ({"loss_type": "aot", "label_smoothing": 0.1}, [0.654226]),
    ({"loss_type": "aot_unpaired", "label_smoothing": 0.1}, [0.648462]),
    ({"loss_type": "apo_zero"}, [0.92514, 1.087264, 1.017497, 0.852561]),
    ({"loss_type": "apo_down"}, [0.962987, 1.049188, 1.012493, 0.976803]),
    ({"loss_type": "discopop"}, [0.740357, 0.88387, 0.796759, 0.548811]),
    ({"loss_type": "sigmoid", "f_divergence_type": "forward_kl"}, [0.502719, 0.933895, 0.724363, 0.566733]),
    ({"loss_type": "ipo", "f_divergence_type": "forward_kl"}, [19.671978, 28.310358, 26.548204, 22.266916]),
    ({"loss_type": "sigmoid", "f_divergence_type": "js_divergence"}, [0.620957, 0.774967, 0.709482, 0.629952]),
    ({"loss_type": "sigmoid_norm", "f_divergence_type": "js_divergence"}, [0.682802, 0.699125, 0.697095, 0.686604]),
    ({"loss_type": "hinge", "f_divergence_type": "js_divergence"}, [0.85, 1.157449, 1.032406, 0.869345]),
    ({"loss_type": "sigmoid", "f_divergence_type": "alpha_divergence"}, [0.542147, 0.883279, 0.726317, 0.548705]),
    ({"loss_type": "discopop", "f_divergence_type": "alpha_divergence"}, [0.719449, 0.883769, 0.799062, 0.730665]),
    ({"loss_type": "cpo"}, [0.533382, 0.825939, 0.481675, 0.744397]),
    ({"loss_type": "cpo", "label_smoothing": 0.1}, [0.568382, 0.800939, 0.529675, 0.734397]),
    ({"loss_type": "cpo_hinge"}, [0.65, 1.25, 0.52, 1.1]),
    ({"loss_type": "cpo_ipo"}, [25.628906, 23.476334, 21.16, 21.966738]),
    ({"loss_type": "simpo"}, [1.40615, 1.096833, 0.798139, 0.897375]),
    ({"loss_type": "simpo", "label_smoothing": 0.1}, [1.29365, 1.027785, 0.778139, 0.860001]),
    ({"loss_type": "orpo"}, [0.073013, 0.061043, 0.047314, 0.052973]),
    # Mitchell 2023, "A note on DPO with noisy preferences": -(1 - e) log sigmoid(x) - e log sigmoid(-x)
    ({"loss_type": "sigmoid", "label_smoothing": 0.1}, [0.584355, 0.848382, 0.72176, 0.497488]),
]
SMOOTHED: dict[str, dict[str, Any]] = {"exo_pair": {"label_smoothing": 0.001}}
DIVERGENCES = ("forward_kl", "js_divergence", "alpha_divergence")
WITH_EACH_DIVERGENCE = [(name, divergence) for name in sorted(WITH_DIVERGENCE) for divergence in DIVERGENCES]


def build_scores(dtype: torch.dtype = torch.float32, **changes: list[float]) -> PairScores:
    return PairScores(**{name: torch.tensor(values, dtype=dtype) for name, values in (COLUMNS | changes).items()})


def losses_of(scores: PairScores, **settings: Any) -> Tensor:
    return compute_pair_losses(scores, PreferenceArgs(**settings))


@pytest.mark.parametrize(("settings", "expected"), GOLDEN)
def test_frozen_numbers(settings: dict[str, Any], expected: list[float]) -> None:
    losses = losses_of(build_scores(), **settings)
    losses = losses if len(expected) == len(losses) else losses.mean(0, keepdim=True)
    torch.testing.assert_close(losses, torch.tensor(expected), rtol=1e-5, atol=2e-6)


def test_every_loss_of_pairs_has_a_row() -> None:
    assert set(PAIR_LOSSES) == set(get_args(LossType)) - {"sft", "kto", "reward"}
    assert {settings["loss_type"] for settings, _ in GOLDEN} == set(PAIR_LOSSES)


EQUAL = {
    **dict.fromkeys(("sigmoid", "sigmoid_norm", "robust", "aot", "aot_unpaired", "discopop"), math.log(2)),
    **{"hinge": 1.0, "ipo": 1 / (4 * 0.3**2), "sppo_hard": 2 / (2 * 0.3) ** 2, "apo_zero": 1.0, "apo_down": 1.0},
    **{"nca_pair": 2 * math.log(2), "bco_pair": 2 * math.log(2)},
    "exo_pair": math.log(0.5) - 0.5 * math.log(0.001) - 0.5 * math.log(0.999),
}


@pytest.mark.parametrize(
    ("name", "divergence"),
    [*((name, "reverse_kl") for name in sorted(WITH_REFERENCE - {"kto"})), *WITH_EACH_DIVERGENCE],
)
def test_values_where_the_policy_equals_the_reference(name: str, divergence: str) -> None:
    given = {"loss_type": name, "f_divergence_type": divergence, "beta": 0.3, **SMOOTHED.get(name, {})}
    scores = build_scores(torch.float64, reference_chosen=COLUMNS["chosen"], reference_rejected=COLUMNS["rejected"])
    expected = EQUAL[name] if name != "discopop" else 0.5 * math.log(2) + 0.5
    torch.testing.assert_close(losses_of(scores, **given), torch.full((4,), expected, dtype=torch.float64))
    rewards = compute_rewards(scores, PreferenceArgs(**given))
    assert not torch.stack(rewards).any()


def test_several_losses_are_added_with_their_weights() -> None:
    scores = build_scores()
    both = losses_of(scores, loss_type=["sigmoid", "bco_pair", "sft"], loss_weights=[0.8, 0.2, 1.0])
    alone = 0.8 * losses_of(scores) + 0.2 * losses_of(scores, loss_type="bco_pair")
    torch.testing.assert_close(both, alone)
    assert not losses_of(scores, loss_type="sft").any()


def test_alpha_divergence_has_the_other_two_as_limits() -> None:
    scores = build_scores(torch.float64)
    for alpha, divergence in ((0.0, "forward_kl"), (1.0, "reverse_kl")):
        limit = losses_of(scores, f_divergence_type="alpha_divergence", f_alpha_divergence_coef=alpha)
        torch.testing.assert_close(limit, losses_of(scores, f_divergence_type=divergence))
    near = losses_of(scores, f_divergence_type="alpha_divergence", f_alpha_divergence_coef=1 - 1e-5)
    torch.testing.assert_close(near, losses_of(scores), rtol=1e-3, atol=0)


def test_the_gradient_of_dpo_is_that_of_the_paper() -> None:
    """Rafailov et al. 2023, section 4: -b sigmoid(-b delta) (grad log p(chosen) - grad log p(rejected))."""
    scores = build_scores(torch.float64)
    for tensor in (scores.chosen, scores.rejected):
        tensor.requires_grad_()
    chosen, rejected = torch.autograd.grad(losses_of(scores, beta=0.4).sum(), (scores.chosen, scores.rejected))
    delta = scores.chosen_ratio - scores.rejected_ratio
    wanted = -0.4 * torch.sigmoid(-0.4 * delta).detach()
    torch.testing.assert_close(chosen, wanted)
    torch.testing.assert_close(rejected, -wanted)


@pytest.mark.parametrize("name", sorted(PAIR_LOSSES))
def test_gradients_equal_finite_differences(name: str) -> None:
    settings = PreferenceArgs(loss_type=name, **SMOOTHED.get(name, {}))
    scores = build_scores(torch.float64)

    def total(chosen: Tensor, rejected: Tensor) -> Tensor:
        columns = {column: getattr(scores, column) for column in COLUMNS} | {"chosen": chosen, "rejected": rejected}
        return compute_pair_losses(PairScores(**columns), settings)

    inputs = (scores.chosen.requires_grad_(), scores.rejected.requires_grad_())
    assert torch.autograd.gradcheck(total, inputs)


@pytest.mark.parametrize(
    ("name", "divergence"), [*((name, "reverse_kl") for name in sorted(PAIR_LOSSES)), *WITH_EACH_DIVERGENCE]
)
def test_extreme_scores_give_finite_losses(name: str, divergence: str) -> None:
    """Answers that are impossible or certain under the policy."""
    given = {"loss_type": name, "f_divergence_type": divergence, **SMOOTHED.get(name, {})}
    scores = build_scores(chosen=[-4000.0, 0.0, -4000.0, 0.0], rejected=[0.0, -4000.0, -4000.0, 0.0])
    for tensor in (scores.chosen, scores.rejected):
        tensor.requires_grad_()
    losses = losses_of(scores, **given)
    assert losses.isfinite().all()
    for gradient in torch.autograd.grad(losses.sum(), (scores.chosen, scores.rejected)):
        assert gradient.isfinite().all()


def test_beta_multiplies_rewards_once() -> None:
    scores = build_scores(torch.float64)
    chosen, _ = compute_rewards(scores, PreferenceArgs(beta=0.25))
    torch.testing.assert_close(chosen, 0.25 * (scores.chosen - scores.reference_chosen))
    mean, _ = compute_rewards(scores, PreferenceArgs(loss_type="cpo_ipo", beta=0.25))
    torch.testing.assert_close(mean, 0.25 * scores.chosen_ratio / scores.chosen_length)
