"""The micro-batches of a planned step: full rows of tokens without values."""

from dataclasses import replace

import torch

from litgpt.data.stream.batch import Batch
from litgpt.recipe.parallel import ParallelDims
from litgpt.recipe.training import Training
from litgpt.train.run_spec import RunSpec


def build_batches(recipe: Training, spec: RunSpec, dims: ParallelDims, length: int) -> list[Batch]:
    """Build as many micro-batches of a step as may make a difference to its memory.

    Args:
        length: tokens per row, each a target; one document per row, or one answer of a pair.
    """
    micro_batches = min(recipe.train.accumulation(dims.data_ranks), count_in_flight(recipe, dims))
    rows = recipe.train.micro_batch_size * (1 if spec.preference is None else 2)
    ids = torch.zeros(rows, length, dtype=torch.long)
    batch = Batch(ids, ids.clone())
    if spec.preference is not None:
        names = ["margin", "reference"] if spec.scores_ahead else ["margin"]
        answers = torch.zeros(rows, length, dtype=torch.int32)
        batch = replace(batch, answers=answers, answer_values={name: torch.zeros(rows) for name in names})
    return [batch] * micro_batches


def count_in_flight(recipe: Training, dims: ParallelDims) -> int:
    """The number of micro-batches after which more of them need no more memory.

    The second has the gradients of the first. In a pipeline, that of GPipe holds all of them, and the first device of
    the others runs at most twice as many as there are devices before the first backward pass.
    """
    if dims.pipeline == 1:
        return 2
    if recipe.parallel.pipeline_schedule == "gpipe":
        return recipe.train.accumulation(dims.data_ranks)
    return 2 * dims.pipeline
