"""The micro-batches of a planned step: full rows of tokens without values."""

from dataclasses import replace

import torch

from litgpt.data.stream.batch import Batch
from litgpt.recipe.training import Training
from litgpt.train.run_spec import RunSpec


def build_batches(recipe: Training, spec: RunSpec, length: int, micro_batches: int) -> list[Batch]:
    """Build the micro-batches of a step.

    Args:
        length: tokens per row, each a target; one document per row, or one answer of a pair.
        micro_batches: their number, as of `alike_ranks.AlikeRanks`.
    """
    rows = recipe.train.micro_batch_size * (1 if spec.preference is None else 2)
    ids = torch.zeros(rows, length, dtype=torch.long)
    batch = Batch(ids, ids.clone())
    if spec.preference is not None:
        names = ["margin", "reference"] if spec.scores_ahead else ["margin"]
        answers = torch.zeros(rows, length, dtype=torch.int32)
        batch = replace(batch, answers=answers, answer_values={name: torch.zeros(rows) for name in names})
    return [batch] * micro_batches
