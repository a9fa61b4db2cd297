"""One micro batch: tokens, their labels, and where documents begin."""

from dataclasses import dataclass

import torch
from torch import Tensor

IGNORE = -100
"""A label that is no target: it takes no part in the loss and is not counted."""


@dataclass
class Batch:
    """One micro batch of one rank.

    Args:
        ids: (B, T) int64 tokens that the model reads.
        labels: (B, T) int64, the token after each, already shifted; `IGNORE` where there is no target.
        documents: (B, T) int32 number of the document within the row that each token belongs to, where attention is
            to stay inside documents; otherwise None.
        positions: (B, T) int64 positions for rotary embeddings; None means 0 .. T-1.
    """

    ids: Tensor
    labels: Tensor
    documents: Tensor | None = None
    positions: Tensor | None = None

    @property
    def targets(self) -> int:
        """How many labels count."""
        return int((self.labels != IGNORE).sum())

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on another device."""
        return Batch(
            ids=self.ids.to(device, non_blocking=True),
            labels=self.labels.to(device, non_blocking=True),
            documents=None if self.documents is None else self.documents.to(device, non_blocking=True),
            positions=None if self.positions is None else self.positions.to(device, non_blocking=True),
        )
