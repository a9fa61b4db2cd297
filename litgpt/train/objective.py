"""What a run minimises: functions `(model, batch) -> (summed loss, metrics)`; the step divides by the global count."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

from litgpt.data.batch import Batch
from litgpt.recipe.train import LossArgs
from litgpt.train.cross_entropy import chunked_cross_entropy, plain_cross_entropy

Objective = Callable[[nn.Module, Batch], tuple[Tensor, dict[str, Any]]]


def next_token(settings: LossArgs) -> Objective:
    """The negative log-likelihood of each next token, summed over a micro-batch, in nats."""
    cross_entropy: Callable[..., Tensor] = (
        partial(chunked_cross_entropy, chunk_rows=settings.chunk_rows)
        if settings.impl == "chunked"
        else plain_cross_entropy
    )

    def objective(model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Any]]:
        head = partial(cross_entropy, labels_BT=batch.labels)
        loss = model(batch.ids, positions_BT=batch.positions, documents_BT=batch.documents, head=head)
        return loss, {}

    return objective
