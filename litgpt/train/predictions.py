"""Prediction layers in training: which tokens they embed, their labels, and their losses (DeepSeek-AI 2024, V3, 2.2).

Layer k of K embeds, at each token, the k-th token after it, and predicts the one after that. Both are in the same
document, and the label is a target; other tokens have no loss.

Axes: B batch, T tokens of a row, P tokens of this rank, N = B P.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from litgpt.data.stream.batch import IGNORE, Batch
from litgpt.train.cross_entropy import Labels
from litgpt.train.local_batch import ROW_PADDING, LocalBatch


def take_later_tokens(batch: Batch, layers: int) -> dict[str, Tensor]:
    """The ids, labels and weights (K, B, T) of the tokens after each that belong to its document.

    Args:
        layers: the number K of prediction layers.
    """
    names = ["ids", "labels", *(["weights"] if batch.weights is not None else [])]
    within = [is_within_document(batch, number) for number in range(1, layers + 1)]
    return {
        name: torch.stack(
            [
                getattr(batch, name).roll(-number, 1).masked_fill(~kept_BT, ROW_PADDING[name])
                for number, kept_BT in enumerate(within, start=1)
            ]
        )
        for name in names
    }


def is_within_document(batch: Batch, number: int) -> Tensor:
    """Whether the token this number of tokens later is in the row and in the document of each token, (B, T)."""
    index_T = torch.arange(batch.ids.shape[1], device=batch.ids.device)
    kept_BT = (index_T < len(index_T) - number).expand_as(batch.ids)
    return kept_BT if batch.documents is None else kept_BT & (batch.documents.roll(-number, 1) == batch.documents)


def compute_prediction_losses(
    model: Any, local: LocalBatch, head: Callable[..., Tensor], target: Labels
) -> tuple[Tensor, Tensor, Tensor]:
    """Run a model with its prediction layers.

    Args:
        head: the cross-entropy, a function of `target`.
        target: the next tokens.

    Returns:
        the summed loss of the next tokens, the mean over layers of the summed loss of their predictions, and the sum
        and the number of these losses, without factors, by layer (2, K).
    """
    assert local.later_tokens is not None
    ids_KBP, labels_KBP = local.later_tokens["ids"], local.later_tokens["labels"]
    weights_K = local.later_tokens.get("weights", [None] * len(labels_KBP))
    losses_KN = torch.zeros_like(labels_KBP, dtype=torch.float64).flatten(1)
    targets = [
        replace(target, labels_BT=labels, weights_BT=weights, losses_N=losses)
        for labels, weights, losses in zip(labels_KBP, weights_K, losses_KN, strict=True)
    ]
    heads = [partial(head, target=labels) for labels in (target, *targets)]
    predictions = list(zip(ids_KBP, heads[1:], strict=True))
    options = {"media": local.media, "head": heads[0], "predictions": predictions}
    loss_sum, *sums = model(local.ids, inputs=local.inputs, **options)
    numbers_K = labels_KBP.ne(IGNORE).flatten(1).sum(1)
    return loss_sum, torch.stack(sums).mean(), torch.stack([losses_KN.sum(1), numbers_K.double()])
