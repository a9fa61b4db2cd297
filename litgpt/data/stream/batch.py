"""One micro batch: tokens, their labels, and where documents begin."""

from dataclasses import dataclass, fields

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
            to stay inside documents; otherwise None. -1 is padding.
        positions: (B, T) int64 position of each token in its document; None means 0 .. T-1.
        weights: (B, T) float32 factor of each label's loss, 0 where it is ignored; None means 1.
        channels: (B, T) int32 number of the channel that each label's loss is reported in; None means one channel.
    """

    ids: Tensor
    labels: Tensor
    documents: Tensor | None = None
    positions: Tensor | None = None
    weights: Tensor | None = None
    channels: Tensor | None = None

    @property
    def targets(self) -> int:
        """How many labels count."""
        return int((self.labels != IGNORE).sum())

    @property
    def tokens(self) -> int:
        """How many tokens are no padding."""
        return self.ids.numel() if self.documents is None else int((self.documents >= 0).sum())

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on another device."""
        moved = {
            field.name: value.to(device, non_blocking=True)
            for field in fields(self)
            if (value := getattr(self, field.name)) is not None
        }
        return Batch(**moved)
