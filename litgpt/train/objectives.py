"""The objectives of training by their names in a recipe, and those of a loss that the user writes."""

from collections.abc import Callable, Sequence
from typing import Any, cast

from torch import Tensor

from litgpt.data.stream.batch import Batch
from litgpt.errors import UserError
from litgpt.recipe.align import Align
from litgpt.recipe.train import LossArgs
from litgpt.recipe.training import Training
from litgpt.train.answer_scores import AnswerScorer
from litgpt.train.kto import rated_answers
from litgpt.train.local_batch import LocalBatch
from litgpt.train.log_probs import TokenLabels
from litgpt.train.objective import Objective, next_token
from litgpt.train.preference import paired_answers
from litgpt.train.reward import pair_rewards
from litgpt.train.run_spec import RunSpec

LogProbLoss = Callable[[Tensor, LocalBatch], Tensor]


def build_next_token(recipe: Training, spec: RunSpec, channels: Sequence[str]) -> Objective:
    """Build the objective of pretraining and finetuning."""
    return next_token(recipe.loss, channels, prediction_layers=spec.count_trained_predictions())


def build_paired_answers(recipe: Training, _spec: RunSpec, _channels: Sequence[str]) -> Objective:
    """Build the objective of preferences between pairs of answers."""
    return paired_answers(cast(Align, recipe).preference, recipe.loss)


def build_rated_answers(recipe: Training, _spec: RunSpec, _channels: Sequence[str]) -> Objective:
    """Build the objective of answers that are rated as desirable or not."""
    return rated_answers(cast(Align, recipe).preference, recipe.loss)


def build_pair_rewards(recipe: Training, _spec: RunSpec, _channels: Sequence[str]) -> Objective:
    """Build the objective of reward models."""
    return pair_rewards(cast(Align, recipe).preference)


OBJECTIVES: dict[str, Callable[[Training, RunSpec, Sequence[str]], Objective]] = {
    "next_token": build_next_token,
    "pairs": build_paired_answers,
    "kto": build_rated_answers,
    "reward": build_pair_rewards,
}


def build_objective(recipe: Training, spec: RunSpec, channels: Sequence[str]) -> Objective:
    """Build the objective of a recipe.

    Args:
        channels: the names of the numbers in `Batch.channels`.
    """
    return OBJECTIVES[recipe.objective](recipe, spec, channels)


def log_prob_loss(compute: LogProbLoss, settings: LossArgs) -> Objective:
    """A loss that is computed from the log-probabilities of the labels; its divisor is the number of labels.

    Args:
        compute: returns the sum () of a loss over the labels of a micro-batch, given their log-probabilities (B, T) in
            nats, 0 where there is no label, and the micro-batch. If a row is split over ranks, both are this rank's
            shard.
        settings: selects the implementation of the head.
    """
    scorer = AnswerScorer(settings)

    def loss(model: Any, local: LocalBatch) -> tuple[Tensor, None]:
        log_probs = scorer.compute_log_probs(model, local, TokenLabels(local.labels)).view_as(local.labels)
        total = compute(log_probs, local)
        if total.shape != () or not total.requires_grad:
            raise UserError(
                f"loss: the function has returned {tuple(total.shape)}, with requires_grad: {total.requires_grad}; "
                "return a sum (), computed from the log-probabilities"
            )
        return total[None], None

    return Objective(loss, count_batch_labels, keep_batch)


def count_batch_labels(batch: Batch) -> tuple[float]:
    """The number of labels."""
    return (batch.targets,)


def keep_batch(batch: Batch) -> Batch:
    """The batch as it is."""
    return batch
