"""Scores of answers: the weighted sums of the log-probabilities of their labels.

Axes: B rows, T tokens of a row, P tokens of this rank, N = B P, A answers of a micro-batch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from litgpt.data.stream.batch import IGNORE, Batch
from litgpt.recipe.train import LossArgs
from litgpt.train.evaluate import eval_mode, evaluate
from litgpt.train.local_batch import LocalBatch
from litgpt.train.log_probs import TokenLabels, chunked_log_probs, plain_log_probs
from litgpt.train.train_state import TrainState

TOKEN_METRICS = ("logits/chosen", "logits/rejected", "nll_loss")


@dataclass(frozen=True)
class AnswerScorer:
    """How answers are scored, by the policy and the reference alike.

    Attributes:
        settings: selects the implementation of the head.
        ld_alpha: factor of the labels beyond as many as the shorter answer of a pair has (Liu et al. 2024, LD-DPO);
            None for 1.
    """

    settings: LossArgs
    ld_alpha: float | None = None

    def measure(self, batch: Batch) -> Batch:
        """Add `length` to the values of the answers, the number of labels (A,).

        With `ld_alpha`, also add `shared_end`: the position of the last label that the other answer of the pair has a
        counterpart of, -1 for none.
        """
        values = get_values(batch) | {"length": count_labels(batch)}
        if self.ld_alpha is not None:
            values["shared_end"] = find_shared_end(batch, values["length"])
        return replace(batch, answer_values=values)

    def compute_log_probs(self, model: Any, local: LocalBatch, target: TokenLabels) -> Tensor:
        """The log-probability (N,) of each label in nats, 0 where it is ignored."""
        chunked = partial(chunked_log_probs, chunk_rows=self.settings.chunk_rows)
        compute: Callable[..., Tensor] = chunked if self.settings.impl == "chunked" else plain_log_probs
        head = partial(compute, target=target, vocabulary=local.vocabulary)
        return model(local.ids, inputs=local.inputs, media=local.media, head=head)

    def weigh_labels(self, local: LocalBatch) -> Tensor | float:
        """The factor of each label's log-probability in the score of its answer, (N,) or 1."""
        weights = 1.0 if local.weights is None else local.weights.flatten()
        if self.ld_alpha is None:
            return weights
        assert local.answers is not None and local.answer_values is not None
        ends_BP = local.answer_values["shared_end"][local.answers.long()]  # of any answer for padding
        is_shared = (local.inputs.positions <= ends_BP).flatten()
        return weights * torch.where(is_shared, 1.0, self.ld_alpha)

    def score(self, train_state: TrainState, batches: Sequence[Batch]) -> list[Tensor | None]:
        """The scores (A,) of the answers of micro-batches, without gradients and dropout, in nats.

        All ranks call this together. None on ranks without the last stage of a pipeline.
        """

        def run(model: Any, local: LocalBatch) -> Tensor:
            log_probs = self.compute_log_probs(model, local, TokenLabels(local.labels))
            return sum_by_answer(local, log_probs * self.weigh_labels(local))

        with eval_mode(train_state):
            local_batches = (train_state.local_batch(self.measure(batch.to(train_state.device))) for batch in batches)
            return [evaluate(train_state, local, run) for local in local_batches]

    def score_reference(self, train_state: TrainState, batches: Sequence[Batch]) -> list[Batch]:
        """Add `reference` to the values of the answers: their scores by the reference. Stored ones are kept."""
        if all("reference" in get_values(batch) for batch in batches):
            return list(batches)
        if train_state.reference_scores is not None:
            return [train_state.reference_scores.add_to(self.measure(batch)) for batch in batches]
        assert train_state.reference is not None
        with train_state.reference.applied(train_state.core):
            return add_values(batches, "reference", self.score(train_state, batches))


def get_values(batch: Batch) -> dict[str, Tensor]:
    """The values of the answers of a batch."""
    return batch.answer_values or {}


def add_values(batches: Sequence[Batch], name: str, values: Sequence[Tensor | None]) -> list[Batch]:
    """Add a value of each answer to micro-batches; those with None stay as they are."""
    return [
        batch if value is None else replace(batch, answer_values=get_values(batch) | {name: value})
        for batch, value in zip(batches, values, strict=True)
    ]


def count_labels(batch: Batch) -> Tensor:
    """The number of labels of each answer, (A,) float32."""
    assert batch.answers is not None
    answers, kept = batch.answers.flatten().long(), batch.labels.flatten() != IGNORE
    return torch.bincount(answers[kept], minlength=count_answers(batch)).float()


def count_answers(batch: Batch) -> int:
    """The number of answers of a micro-batch, A."""
    values = list(get_values(batch).values())
    assert batch.answers is not None
    return len(values[0]) if values else int(batch.answers.max()) + 1


def find_shared_end(batch: Batch, lengths: Tensor) -> Tensor:
    """The position (A,) of the last label of each answer that the other answer of the pair has a counterpart of."""
    assert batch.answers is not None
    positions = batch.positions
    if positions is None or positions.dim() == 3:  # the order of tokens is in none of three rows
        positions = torch.arange(batch.ids.shape[1], device=batch.ids.device).expand_as(batch.ids)
    kept = batch.labels.flatten() != IGNORE
    answers, positions = batch.answers.flatten()[kept].long(), positions.flatten()[kept]
    order = torch.argsort(answers, stable=True)  # the labels of each answer follow each other, in their order
    starts = lengths.cumsum(0) - lengths
    shared = lengths.view(-1, 2).amin(1).repeat_interleave(2)
    ends = torch.full_like(lengths, -1, dtype=torch.long)
    some = shared > 0
    ends[some] = positions[order][(starts + shared - 1)[some].long()]
    return ends


def sum_by_answer(local: LocalBatch, values_N: Tensor) -> Tensor:
    """The sum (A,) of a value of each token over the tokens of each answer, on all ranks that share its row."""
    assert local.answers is not None and local.answer_values is not None
    answers = local.answers.flatten().long()
    kept = answers >= 0
    # in float64, so that the order of the additions on a GPU does not change the rounded sum
    sums = torch.zeros(len(local.answer_values["length"]), dtype=torch.float64, device=values_N.device)
    sums = sums.index_add(0, answers[kept], values_N[kept].double())
    return local.sum_over_shards(sums.to(values_N.dtype))


def measure_tokens(
    local: LocalBatch, log_probs_N: Tensor, target: TokenLabels, is_chosen: Tensor
) -> tuple[Tensor, Tensor]:
    """The loss of the labels of chosen answers in nats, and the sums and numbers of `TOKEN_METRICS`, (2, 3).

    Args:
        is_chosen: whether an answer is a chosen one, (A,).
    """
    assert local.answers is not None and target.mean_logits_N is not None
    labelled = local.labels.flatten() != IGNORE
    in_chosen = is_chosen[local.answers.flatten().clamp(min=0).long()]
    chosen, rejected = labelled & in_chosen, labelled & ~in_chosen
    weights = 1.0 if local.weights is None else local.weights.flatten()
    nll = -(log_probs_N * weights)[chosen].sum()
    sums = [target.mean_logits_N[chosen].sum(), target.mean_logits_N[rejected].sum(), nll.detach()]
    numbers = [chosen.sum(), rejected.sum(), chosen.sum()]
    return nll, torch.stack([torch.stack([value.double() for value in row]) for row in (sums, numbers)])
