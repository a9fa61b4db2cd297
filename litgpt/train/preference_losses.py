"""The losses of pairs of answers, as functions of the log-probabilities of both under a policy and a reference.

Axis: P pairs. b is `beta` and e is `label_smoothing`. The functions are the losses of the papers that they cite;
`transform_ratio` replaces their log-ratios by those of other divergences.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from litgpt.recipe.preference import PreferenceArgs

MAX_EXPONENT = 40.0
"""Exponents are limited to this, so that the square of the exponential does not overflow float32."""


@dataclass(frozen=True)
class PairScores:
    """Log-probabilities of pairs of answers, each (P,).

    Attributes:
        chosen: weighted sum of the log-probabilities of the labels of the chosen answer under the policy.
        rejected: the same of the rejected answer.
        reference_chosen: the same under the reference; zeros without one. Likewise `reference_rejected`.
        chosen_length: number of labels of the chosen answer. Likewise `rejected_length`.
    """

    chosen: Tensor
    rejected: Tensor
    reference_chosen: Tensor
    reference_rejected: Tensor
    chosen_length: Tensor
    rejected_length: Tensor

    @property
    def chosen_ratio(self) -> Tensor:
        """The log-ratio of policy and reference for the chosen answer."""
        return self.chosen - self.reference_chosen

    @property
    def rejected_ratio(self) -> Tensor:
        """The log-ratio of policy and reference for the rejected answer."""
        return self.rejected - self.reference_rejected

    def divide_by_length(self, chosen: Tensor, rejected: Tensor) -> tuple[Tensor, Tensor]:
        """Means per label from sums of the two answers."""
        return chosen / self.chosen_length.clamp(min=1), rejected / self.rejected_length.clamp(min=1)


PairLoss = Callable[[PairScores, PreferenceArgs], Tensor]


def compute_pair_losses(scores: PairScores, settings: PreferenceArgs) -> Tensor:
    """The weighted sum (P,) of the chosen losses, without the loss of the tokens of chosen answers (`nll_weight`)."""
    total = torch.zeros_like(scores.chosen)
    for name, weight in zip(settings.types, settings.weights, strict=True):
        if name in PAIR_LOSSES:
            total = total + weight * PAIR_LOSSES[name](scores, settings)
    return total


def compute_rewards(scores: PairScores, settings: PreferenceArgs) -> tuple[Tensor, Tensor]:
    """The rewards (P,) of both answers: b times the log-ratio, or its mean per label if the loss is of means."""
    chosen, rejected = scores.chosen_ratio, scores.rejected_ratio
    if MEANS & set(settings.types):
        chosen, rejected = scores.divide_by_length(chosen, rejected)
    return settings.resolved_beta * chosen, settings.resolved_beta * rejected


def transform_ratio(ratio: Tensor, settings: PreferenceArgs) -> Tensor:
    """f'(u) of a divergence at the ratio u of probabilities, given log u; f'(1) = 0 (Wang et al. 2024, f-DPO).

    alpha_divergence has f'(u) = (u^(alpha - 1) - 1) / (alpha - 1): that of forward_kl for 0, of reverse_kl for 1.
    """
    if settings.f_divergence_type == "js_divergence":
        return F.logsigmoid(ratio) + math.log(2)
    order = {"reverse_kl": 0.0, "forward_kl": -1.0}.get(
        settings.f_divergence_type, settings.f_alpha_divergence_coef - 1
    )
    if abs(order) < 1e-6:
        return ratio
    return torch.expm1((order * ratio).clamp(max=MAX_EXPONENT)) / order


def compare_ratios(scores: PairScores, settings: PreferenceArgs) -> Tensor:
    """b times the difference of the transformed log-ratios."""
    chosen = transform_ratio(scores.chosen_ratio, settings)
    return settings.resolved_beta * (chosen - transform_ratio(scores.rejected_ratio, settings))


def compare_mean_ratios(scores: PairScores, settings: PreferenceArgs) -> Tensor:
    """The difference of the transformed log-ratios, each divided by the length of its answer."""
    chosen, rejected = transform_ratio(scores.chosen_ratio, settings), transform_ratio(scores.rejected_ratio, settings)
    chosen, rejected = scores.divide_by_length(chosen, rejected)
    return chosen - rejected


def compute_smoothed_loss(logits: Tensor, settings: PreferenceArgs) -> Tensor:
    """-log sigmoid, for labels that are wrong with probability e (Mitchell 2023, conservative DPO)."""
    wrong = settings.label_smoothing
    return -(1 - wrong) * F.logsigmoid(logits) - wrong * F.logsigmoid(-logits)


def sigmoid(scores: PairScores, settings: PreferenceArgs) -> Tensor:
    """DPO (Rafailov et al. 2023, eq. 7); with label_smoothing conservative DPO, which TRL 1 leaves out."""
    return compute_smoothed_loss(compare_ratios(scores, settings), settings)


def sigmoid_norm(scores: PairScores, settings: PreferenceArgs) -> Tensor:
    """DPO of mean log-ratios (Lambert et al. 2024, Tulu 3)."""
    return -F.logsigmoid(settings.resolved_beta * compare_mean_ratios(scores, settings))


def hinge(scores: PairScores, settings: PreferenceArgs) -> Tensor:
    """SLiC with a reference (Zhao et al. 2023; Liu et al. 2024, RSO)."""
    return torch.relu(1 - compare_ratios(scores, settings))


def ipo(scores: PairScores, settings: PreferenceArgs) -> Tensor:
    """IPO (Azar et al. 2024, eq. 17) of mean log-ratios, as its authors train it; b is their tau."""
    return (compare_mean_ratios(scores, settings) - 1 / (2 * settings.resolved_beta)).square()


def exo_pair(scores: PairScores, settings: PreferenceArgs) -> Tensor:
    """EXO for pairs (Ji et al. 2024, eq. 16): the reverse KL divergence to the smoothed labels 1 - e and e."""
    logits, wrong = compare_ratios(scores, settings), settings.label_smoothing
    chosen = logits.sigmoid() * (F.logsigmoid(logits) - math.log1p(-wrong))
    return chosen + (-logits).sigmoid() * (F.logsigmoid(-logits) - math.log(wrong))


def nca_pair(scores: PairScores, settings: PreferenceArgs) -> Tensor:
    """NCA for pairs (Chen et al. 2024, Noise Contrastive Alignment)."""
    chosen, rejected = compute_rewards(scores, settings)
    return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)


def robust(scores: PairScores, settings: PreferenceArgs) -> Tensor:
    """Robust DPO (Chowdhury et al. 2024): unbiased if labels are wrong with probability e."""
    logits, wrong = compare_ratios(scores, settings), settings.label_smoothing
    return (-(1 - wrong) * F.logsigmoid(logits) + wrong * F.logsigmoid(-logits)) / (1 - 2 * wrong)


def bco_pair(scores: PairScores, settings: PreferenceArgs) -> Tensor:
    """BCO (Jung et al. 2024) with a reward shift of 0, as in TRL 1, so that no state is kept between batches."""
    chosen, rejected = compute_rewards(scores, settings)
    return -F.logsigmoid(chosen) - F.logsigmoid(-rejected)


def sppo_hard(scores: PairScores, settings: PreferenceArgs) -> Tensor:
    """SPPO (Wu et al. 2024, eq. 4.7) with win probabilities 1 and 0."""
    goal = 0.5 / settings.resolved_beta
    return (scores.chosen_ratio - goal).square() + (scores.rejected_ratio + goal).square()


def aot(scores: PairScores, settings: PreferenceArgs) -> Tensor:
    """AOT (Melnyk et al. 2024): the sorted margins of the micro-batch against those of the reference."""
    margins, _ = torch.sort(scores.chosen - scores.rejected)
    reference, _ = torch.sort(scores.reference_chosen - scores.reference_rejected)
    return compute_smoothed_loss(settings.resolved_beta * (margins - reference), settings)


def aot_unpaired(scores: PairScores, settings: PreferenceArgs) -> Tensor:
    """Unpaired AOT (Melnyk et al. 2024): the sorted chosen log-ratios of the micro-batch against the rejected ones."""
    chosen, _ = torch.sort(scores.chosen_ratio)
    rejected, _ = torch.sort(scores.rejected_ratio)
    return compute_smoothed_loss(settings.resolved_beta * (chosen - rejected), settings)


def apo_zero(scores: PairScores, settings: PreferenceArgs) -> Tensor:
    """APO-zero (D'Oosterlinck et al. 2024, eq. 7): chosen answers are better than the model's own."""
    chosen, rejected = compute_rewards(scores, settings)
    return 1 - chosen.sigmoid() + rejected.sigmoid()


def apo_down(scores: PairScores, settings: PreferenceArgs) -> Tensor:
    """APO-down (D'Oosterlinck et al. 2024, eq. 8): chosen answers are worse than the model's own."""
    chosen, rejected = compute_rewards(scores, settings)
    return chosen.sigmoid() + 1 - (chosen - rejected).sigmoid()


def discopop(scores: PairScores, settings: PreferenceArgs) -> Tensor:
    """DiscoPOP (Lu et al. 2024, eq. 5): a blend of the logistic and the exponential loss."""
    logits = compare_ratios(scores, settings)
    share = torch.sigmoid(logits / settings.discopop_tau)
    return -F.logsigmoid(logits) * (1 - share) + torch.exp((-logits).clamp(max=MAX_EXPONENT)) * share


def orpo(scores: PairScores, settings: PreferenceArgs) -> Tensor:
    """The odds ratio loss (Hong et al. 2024, ORPO, eq. 6-7) of mean log-probabilities; b is their lambda.

    The loss of the tokens that is added to it is that of the chosen answer, as in the paper; TRL adds the prompt.
    """
    chosen, rejected = scores.divide_by_length(scores.chosen, scores.rejected)
    return -settings.resolved_beta * F.logsigmoid(compute_log_odds(chosen) - compute_log_odds(rejected))


def compute_log_odds(log_probs: Tensor) -> Tensor:
    """log(p / (1 - p)) of log p; the largest p is just below 1."""
    log_probs = log_probs.clamp(max=-1e-6)
    return log_probs - torch.log(-torch.expm1(log_probs))


def cpo(scores: PairScores, settings: PreferenceArgs) -> Tensor:
    """CPO (Xu et al. 2024, eq. 3): DPO with a uniform reference."""
    return compute_smoothed_loss(settings.resolved_beta * (scores.chosen - scores.rejected), settings)


def cpo_hinge(scores: PairScores, settings: PreferenceArgs) -> Tensor:
    """CPO with the hinge loss."""
    return torch.relu(1 - settings.resolved_beta * (scores.chosen - scores.rejected))


def cpo_ipo(scores: PairScores, settings: PreferenceArgs) -> Tensor:
    """CPO with the loss of IPO, of mean log-probabilities."""
    chosen, rejected = scores.divide_by_length(scores.chosen, scores.rejected)
    return (chosen - rejected - 1 / (2 * settings.resolved_beta)).square()


def simpo(scores: PairScores, settings: PreferenceArgs) -> Tensor:
    """SimPO (Meng et al. 2024, eq. 6): mean log-probabilities with a margin."""
    chosen, rejected = scores.divide_by_length(scores.chosen, scores.rejected)
    return compute_smoothed_loss(settings.resolved_beta * (chosen - rejected) - settings.simpo_gamma, settings)


MEANS = {"orpo", "simpo", "cpo_ipo"}
PAIR_LOSSES: dict[str, PairLoss] = {
    "sigmoid": sigmoid,
    "sigmoid_norm": sigmoid_norm,
    "hinge": hinge,
    "ipo": ipo,
    "exo_pair": exo_pair,
    "nca_pair": nca_pair,
    "robust": robust,
    "bco_pair": bco_pair,
    "sppo_hard": sppo_hard,
    "aot": aot,
    "aot_unpaired": aot_unpaired,
    "apo_zero": apo_zero,
    "apo_down": apo_down,
    "discopop": discopop,
    "orpo": orpo,
    "cpo": cpo,
    "cpo_hinge": cpo_hinge,
    "cpo_ipo": cpo_ipo,
    "simpo": simpo,
}
