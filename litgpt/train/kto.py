"""The objective of answers that are rated as desirable or not (Ethayarajh et al. 2024, KTO).

Axes: N tokens of this rank, A answers of a micro-batch. In the data, answer 2 i is the rated one of sample i, and
2 i + 1 a mismatched one: its prompt with the answer of another sample.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from litgpt.data.stream.batch import Batch
from litgpt.parallel.reduce import all_reduce_sum
from litgpt.recipe.preference import PreferenceArgs
from litgpt.recipe.train import LossArgs
from litgpt.train.answer_scores import (
    TOKEN_METRICS,
    AnswerScorer,
    add_values,
    count_labels,
    get_values,
    measure_tokens,
    sum_by_answer,
)
from litgpt.train.local_batch import LocalBatch
from litgpt.train.log_probs import TokenLabels
from litgpt.train.objective import Objective
from litgpt.train.train_state import TrainState

ANSWER_METRICS = (
    *("rewards/chosen", "rewards/rejected", "rewards/accuracies"),
    *("logps/chosen", "logps/rejected", "kl"),
)

MARGINS = {"rewards/margins": ("rewards/chosen", "rewards/rejected")}
"""Defined where a batch has answers of both kinds."""


def rated_answers(preference: PreferenceArgs, settings: LossArgs) -> Objective:
    """The loss of KTO, a mean over the rated answers of the global batch.

    It is w (1 - sigmoid(b (log-ratio - KL))) for a desirable answer, and w (1 - sigmoid(b (KL - log-ratio))) for an
    undesirable one, with a weight w for each kind and b for `beta`.

    The KL divergence is estimated from the mismatched answers of the whole global batch, so it does not depend on how
    that is cut into micro-batches; in validation, from those of the micro-batch of all ranks. Their gradient is not
    needed, so only the rated answers are trained on. `chosen` in the names of metrics are the desirable answers.
    """
    scorer = AnswerScorer(settings)

    def loss(model: Any, local: LocalBatch) -> tuple[Tensor, Tensor]:
        assert local.answer_values is not None
        zeros = torch.zeros(local.labels.numel(), dtype=torch.float64, device=local.labels.device)
        target = TokenLabels(local.labels, mean_logits_N=zeros)
        log_probs = scorer.compute_log_probs(model, local, target)
        scores = sum_by_answer(local, log_probs * scorer.weigh_labels(local))
        desirable = local.answer_values["desirable"] > 0
        losses, metrics = rate_answers(local.answer_values, scores, preference)
        _, token_metrics = measure_tokens(local, log_probs, target, desirable)
        metrics = torch.cat([local.report_once(metrics), token_metrics], dim=1)
        return local.report_once(losses.sum())[None], metrics

    def prepare(train_state: TrainState, batches: Sequence[Batch]) -> list[Batch]:
        moved = [batch.to(train_state.device) for batch in batches]
        parts = [split_answers(batch) for batch in scorer.score_reference(train_state, moved)]
        kl = estimate_kl(train_state, scorer, [mismatched for _, mismatched in parts])
        rated = [batch for batch, _ in parts]
        values = [get_values(batch)["desirable"] for batch in rated]
        return add_values(rated, "kl", [torch.full_like(value, kl, dtype=torch.float64) for value in values])

    metrics = (*ANSWER_METRICS, *TOKEN_METRICS)
    return Objective(loss, count_rated, scorer.measure, prepare, metrics=metrics, differences=MARGINS)


def count_rated(batch: Batch) -> tuple[float]:
    """The number of rated answers with labels."""
    return (float(count_labels(batch)[::2].gt(0).sum()),)


def split_answers(batch: Batch) -> tuple[Batch, Batch]:
    """The rated and the mismatched answers of a micro-batch."""
    assert batch.answers is not None
    is_rated = torch.arange(int(batch.answers.max()) + 1, device=batch.answers.device) % 2 == 0
    return batch.select_answers(is_rated), batch.select_answers(~is_rated)


def estimate_kl(train_state: TrainState, scorer: AnswerScorer, batches: Sequence[Batch]) -> float:
    """The mean of the log-ratios of mismatched answers over all ranks in nats, and at least 0."""
    total, number = 0.0, 0.0
    for batch, scores in zip(batches, scorer.score(train_state, batches), strict=True):
        if scores is not None:
            kept = count_labels(batch) > 0
            total += float((scores - get_values(batch)["reference"])[kept].sum())
            number += float(kept.sum())
    # ranks that share tokens have the same sums, which cancel in the mean
    sums = [value * train_state.counts_loss for value in (total, number)]
    total, number = all_reduce_sum(sums, train_state.device)
    return max(total / number, 0.0) if number else 0.0


def rate_answers(values: dict[str, Tensor], scores: Tensor, preference: PreferenceArgs) -> tuple[Tensor, Tensor]:
    """The losses of the answers with labels, and the sums and numbers of `ANSWER_METRICS`, (2, 6).

    Args:
        values: `length`, `desirable`, `reference` and `kl` of each answer, (A,).
        scores: log-probabilities of the answers, (A,).
    """
    kept = values["length"] > 0
    scores, reference, kl = scores[kept], values["reference"].to(scores)[kept], values["kl"].to(scores)[kept]
    desirable = values["desirable"][kept] > 0
    rewards = preference.resolved_beta * (scores - reference)
    margins = torch.where(desirable, 1.0, -1.0) * (rewards - preference.resolved_beta * kl)
    weights = torch.where(desirable, preference.desirable_weight, preference.undesirable_weight)
    losses = weights * (-margins).sigmoid()  # 1 - sigmoid(margins)
    chosen, rejected, every = desirable.double(), (~desirable).double(), torch.ones_like(scores).double()
    numbers = torch.stack([chosen, rejected, every, chosen, rejected, every])
    rows = torch.stack([rewards, rewards, (margins > 0).to(scores), scores, scores, kl]).detach().double()
    return losses, torch.stack([(rows * numbers).sum(1), numbers.sum(1)])
