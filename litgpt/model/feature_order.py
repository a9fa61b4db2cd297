"""Which features of a vision tower the places of texts read, for models that do not read all in order.

Axes: M places, D width of the decoder.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class FeatureOrder:
    """The features at the places of texts.

    Attributes:
        numbers_M: the number of the feature at each place, of those of all pictures; -1 for the learned one that ends a
            row.
        counts: the number of places of each picture; an image of several has all of its places at the first.
    """

    numbers_M: Tensor
    counts: tuple[int, ...]

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "FeatureOrder":
        """The same on a device."""
        return replace(self, numbers_M=self.numbers_M.to(device, non_blocking=non_blocking))

    def arrange(self, features_MD: Tensor, line_break_D: Tensor) -> Tensor:
        """The features at the places of texts, (M, D), of those of all pictures and the learned one."""
        features_MD = torch.cat([features_MD, line_break_D[None].to(features_MD.dtype)])
        return features_MD[self.numbers_M.to(features_MD.device)]
