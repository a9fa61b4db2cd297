"""The objective of pairs of answers: the losses of their scores, and of the tokens of the chosen ones.

Axes: N tokens of this rank, A answers of a micro-batch, P pairs. Answer 2 i is the chosen one of pair i, and
2 i + 1 the rejected one.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from litgpt.data.stream.batch import Batch
from litgpt.recipe.preference import PreferenceArgs
from litgpt.recipe.train import LossArgs
from litgpt.train.answer_scores import TOKEN_METRICS, AnswerScorer, count_labels, measure_tokens, sum_by_answer
from litgpt.train.local_batch import LocalBatch
from litgpt.train.log_probs import TokenLabels
from litgpt.train.objective import Objective
from litgpt.train.preference_losses import PairScores, compute_pair_losses, compute_rewards
from litgpt.train.train_state import TrainState

PAIR_METRICS = (
    *("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins"),
    *("logps/chosen", "logps/rejected"),
)


def paired_answers(preference: PreferenceArgs, settings: LossArgs) -> Objective:
    """The loss of pairs, a mean over pairs, plus `nll_weight` times that of chosen answers, a mean over their labels.

    Both means are over the global batch. aot and aot_unpaired compare the sorted scores of a micro-batch, and so depend
    on its size. The second loss has neither the factors of `ld_alpha` nor those of `use_weighting`.
    """
    scorer = AnswerScorer(settings, preference.ld_alpha)

    def loss(model: Any, local: LocalBatch) -> tuple[Tensor, Tensor]:
        zeros = torch.zeros(2, local.labels.numel(), dtype=torch.float64, device=local.labels.device)
        log_squares = zeros[0] if preference.use_weighting else None
        target = TokenLabels(local.labels, log_squares, zeros[1])
        log_probs = scorer.compute_log_probs(model, local, target)
        scores, kept = build_pair_scores(local, sum_by_answer(local, log_probs * scorer.weigh_labels(local)))
        losses = compute_pair_losses(scores, preference)
        if log_squares is not None:
            losses = losses * weigh_pairs(local, log_probs.detach() - log_squares)[kept].to(losses)
        is_chosen = torch.arange(2 * len(kept), device=kept.device) % 2 == 0
        nll, token_metrics = measure_tokens(local, log_probs, target, is_chosen)
        weighted = preference.nll_weight * nll if preference.nll_weight else torch.zeros_like(nll)
        metrics = torch.cat([measure_pairs(local, scores, preference), token_metrics], dim=1)
        return torch.stack([local.report_once(losses.sum()), weighted]), metrics

    def prepare(train_state: TrainState, batches: Sequence[Batch]) -> list[Batch]:
        return scorer.score_reference(train_state, batches) if preference.needs_reference else list(batches)

    return Objective(loss, count_pairs, scorer.measure, prepare, metrics=(*PAIR_METRICS, *TOKEN_METRICS), terms=2)


def count_pairs(batch: Batch) -> tuple[float, float]:
    """The number of pairs with labels, and that of the labels of their chosen answers."""
    lengths = count_labels(batch).view(-1, 2)
    return float(lengths.sum(1).gt(0).sum()), float(lengths[:, 0].sum())


def build_pair_scores(local: LocalBatch, scores: Tensor) -> tuple[PairScores, Tensor]:
    """The scores of the pairs with labels, and whether each pair has any (P,)."""
    assert local.answer_values is not None
    lengths = local.answer_values["length"]
    reference = local.answer_values.get("reference", torch.zeros_like(scores)).to(scores)
    kept = lengths.view(-1, 2).sum(1) > 0
    columns = [column for values in (scores, reference, lengths) for column in values.view(-1, 2)[kept].unbind(1)]
    return PairScores(*columns), kept


def weigh_pairs(local: LocalBatch, log_ratios: Tensor) -> Tensor:
    """The weights of pairs (Zhou et al. 2024, WPO, eq. 2): of both answers, the geometric mean of p / sum_v p_v^2.

    Args:
        log_ratios: (N,), log p - log sum_v p_v^2 of each label, 0 where it is ignored.
    """
    assert local.answer_values is not None
    means = sum_by_answer(local, log_ratios) / local.answer_values["length"].clamp(min=1)
    return means.view(-1, 2).sum(1).exp()


def measure_pairs(local: LocalBatch, scores: PairScores, preference: PreferenceArgs) -> Tensor:
    """The sums and numbers of `PAIR_METRICS`, (2, 6)."""
    return sum_rewards(local, *compute_rewards(scores, preference), scores.chosen, scores.rejected)


def sum_rewards(local: LocalBatch, chosen: Tensor, rejected: Tensor, *others: Tensor) -> Tensor:
    """The sums and numbers of the metrics of rewards of pairs (P,), and of other values of them, (2, M)."""
    values = torch.stack([chosen, rejected, (chosen > rejected).to(chosen), chosen - rejected, *others])
    values = values.detach().double()
    return local.report_once(torch.stack([values.sum(1), torch.ones_like(values).sum(1)]))
