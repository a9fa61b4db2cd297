"""The objective of reward models: the score of the chosen answer of a pair is to exceed that of the rejected one.

Axes: N tokens of this rank, D model width, A answers of a micro-batch, P pairs.
"""

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from litgpt.data.stream.batch import Batch
from litgpt.recipe.preference import PreferenceArgs
from litgpt.train.answer_scores import count_labels, get_values, sum_by_answer
from litgpt.train.local_batch import LocalBatch
from litgpt.train.objective import Objective
from litgpt.train.preference import PAIR_METRICS, build_pair_scores, count_pairs, sum_rewards


def pair_rewards(preference: PreferenceArgs) -> Objective:
    """The loss -log sigmoid(r_chosen - r_rejected - margin), a mean over pairs, of the scores r of a reward model.

    The margin is as in Touvron et al. 2023 (Llama 2, eq. 2); without margins it is the loss of Ouyang et al. 2022
    (InstructGPT, eq. 1). `center_rewards_coefficient` times (r_chosen + r_rejected)^2 is added (Eisenstein et al. 2023,
    section 3). The score of an answer is that of its last token.
    """

    def loss(model: Any, local: LocalBatch) -> tuple[Tensor, Tensor]:
        assert local.answer_values is not None
        scores, kept = build_pair_scores(local, compute_scores(model, local))
        chosen, rejected = scores.chosen, scores.rejected
        losses = -F.logsigmoid(chosen - rejected - local.answer_values["margin"].view(-1, 2)[kept, 0].to(chosen))
        if preference.center_rewards_coefficient:
            losses = losses + preference.center_rewards_coefficient * (chosen + rejected).square()
        return local.report_once(losses.sum())[None], sum_rewards(local, chosen, rejected)

    def count(batch: Batch) -> tuple[float]:
        return (count_pairs(batch)[0],)

    return Objective(loss, count, select_last_tokens, metrics=PAIR_METRICS[:4])


def select_last_tokens(batch: Batch) -> Batch:
    """Set weights of 1 for the last token of each answer and 0 for others, and the value `length` of each answer."""
    assert batch.answers is not None
    following = F.pad(batch.answers[:, 1:], (0, 1), value=-1)
    is_last = (batch.answers >= 0) & (batch.answers != following)
    return replace(batch, weights=is_last.float(), answer_values=get_values(batch) | {"length": count_labels(batch)})


def compute_scores(model: Any, local: LocalBatch) -> Tensor:
    """The scores (A,) of the answers, in float32 or wider."""
    assert local.weights is not None
    is_last_N = local.weights.flatten() > 0

    def score_last_tokens(hidden_BPD: Tensor, weight_1D: Tensor, _bias: None, _softcap: None) -> Tensor:
        dtype = torch.promote_types(hidden_BPD.dtype, torch.float32)
        # a sum of products, because autocast would round the inputs of a matrix product
        return (hidden_BPD.flatten(0, 1)[is_last_N].to(dtype) * weight_1D.to(dtype)).sum(-1)

    scores = model(local.ids, inputs=local.inputs, media=local.media, head=score_last_tokens)
    return sum_by_answer(local, scores.new_zeros(len(is_last_N)).masked_scatter(is_last_N, scores))
