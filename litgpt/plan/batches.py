"""The micro-batches of a planned step: full rows of tokens without values."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from unittest.mock import patch

import torch

from litgpt.data.stream.batch import Batch
from litgpt.plan.planned_media import PlannedMedia
from litgpt.recipe.training import Training
from litgpt.train import kto
from litgpt.train.run_spec import RunSpec


def build_batches(
    recipe: Training, spec: RunSpec, length: int, micro_batches: int, media: PlannedMedia | None = None
) -> list[Batch]:
    """Build the micro-batches of a step.

    Args:
        length: tokens per row, each a target; one document per row, or one answer of a pair.
        micro_batches: their number, as of `alike_ranks.AlikeRanks`.
        media: of each row.
    """
    per_sample = 1 if spec.preference is None else 2
    rows = recipe.train.micro_batch_size * per_sample
    ids = torch.zeros(rows, length, dtype=torch.long)
    batch = Batch(ids, ids.clone())
    if media is not None:
        sections = torch.zeros(rows, 3, length, dtype=torch.long) if spec.config.rope_sections else None
        batch = replace(batch, media=media.build_media(rows // per_sample, per_sample), positions=sections)
    if spec.preference is not None:
        names = ["margin", "desirable", "reference"] if spec.scores_ahead else ["margin", "desirable"]
        answers = torch.zeros(rows, length, dtype=torch.int32)
        batch = replace(batch, answers=answers, answer_values={name: torch.zeros(rows) for name in names})
    return [batch] * micro_batches


def join_alternate_rows(batch: Batch) -> tuple[Batch, Batch]:
    """As `kto.split_answers`, which selects answers by their values: every other row, joined to one."""
    assert batch.answers is not None and batch.answer_values is not None
    positions = batch.positions
    if positions is None:
        positions = torch.arange(batch.ids.shape[1]).expand_as(batch.ids)
    rows, values = (batch.ids, batch.labels, positions, batch.answers), batch.answer_values
    halves = []
    for first in range(2):
        chosen_rows = (row[first::2].movedim(0, -2) for row in rows)
        ids, labels, places, answers = (row.reshape(1, *row.shape[:-2], -1) for row in chosen_rows)
        chosen = {name: value[first::2] for name, value in values.items()}
        media = None if batch.media is None else batch.media.select_answers(range(first, len(batch.ids), 2))
        half = Batch(ids, labels, positions=places, answers=answers, answer_values=chosen, media=media)
        halves.append(half)
    return halves[0], halves[1]


@contextmanager
def rated_rows() -> Iterator[None]:
    """The context in which every other row is a rated answer."""
    with patch.object(kto, "split_answers", join_alternate_rows):
        yield
