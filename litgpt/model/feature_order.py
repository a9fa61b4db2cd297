"""Which features of a vision tower the places of texts read, for models that do not read all in order.

Axes: M places, K features that one place reads, D width of the decoder.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class FeatureOrder:
    """The features at the places of texts.

    Attributes:
        numbers_MK: the numbers of the features that each place reads, of those of all pictures; -1 for the learned one
            that ends a row.
        weights_MK: their weights, float32, of which a place has the sum; None for a single feature at each place.
        counts: the number of places of each picture or video; an image of several pictures has all of its places at the
            first.
        features: the number of features of the tower that `numbers_MK` are of.
    """

    numbers_MK: Tensor
    weights_MK: Tensor | None
    counts: tuple[int, ...]
    features: int

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "FeatureOrder":
        """The same on a device."""
        numbers_MK = self.numbers_MK.to(device, non_blocking=non_blocking)
        weights_MK = None if self.weights_MK is None else self.weights_MK.to(device, non_blocking=non_blocking)
        return replace(self, numbers_MK=numbers_MK, weights_MK=weights_MK)

    def to_arrays(self) -> dict[str, np.ndarray]:
        """The same as arrays by name, of which `take_order` makes it again."""
        sizes = {"order_counts": np.array(self.counts, np.int64), "order_features": np.array(self.features)}
        weights = {} if self.weights_MK is None else {"order_weights": self.weights_MK.numpy()}
        return {"order_numbers": self.numbers_MK.numpy(), **sizes, **weights}

    def widen(self, taps: int) -> "FeatureOrder":
        """The same with so many features at each place, of which those that it does not have weigh nothing."""
        if taps == self.numbers_MK.shape[1]:
            return self
        weights_MK = torch.zeros(len(self.numbers_MK), taps)
        weights_MK[:, 0] = 1
        return replace(self, numbers_MK=self.numbers_MK.expand(-1, taps), weights_MK=weights_MK)

    def arrange(self, features_MD: Tensor, line_break_D: Tensor) -> Tensor:
        """The features at the places of texts, (M, D), of those of all pictures and the learned one."""
        features_MD = torch.cat([features_MD, line_break_D[None].to(features_MD.dtype)])
        numbers_MK = self.numbers_MK.to(features_MD.device)
        if self.weights_MK is None:
            return features_MD[numbers_MK[:, 0]]
        weights_MK = self.weights_MK.to(features_MD.device)
        arranged_MD = features_MD[numbers_MK[:, 0]] * weights_MK[:, 0, None]  # in float32 or wider
        for tap in range(1, numbers_MK.shape[1]):
            arranged_MD = arranged_MD + features_MD[numbers_MK[:, tap]] * weights_MK[:, tap, None]
        return arranged_MD.to(features_MD.dtype)


def join_orders(orders: Sequence[FeatureOrder | None]) -> FeatureOrder | None:
    """One order for several media; None if their features are in order."""
    given = [order for order in orders if order is not None]
    if not given:
        return None
    taps = max(order.numbers_MK.shape[1] for order in given)
    starts = list(accumulate((order.features for order in given), initial=0))
    given = [order.widen(taps) for order in given]
    shifted = [each.numbers_MK + start * (each.numbers_MK >= 0) for each, start in zip(given, starts[:-1], strict=True)]
    weights = [order.weights_MK for order in given if order.weights_MK is not None]
    counts = tuple(count for order in given for count in order.counts)
    return FeatureOrder(torch.cat(shifted), torch.cat(weights) if weights else None, counts, starts[-1])


def take_order(arrays: dict[str, np.ndarray]) -> FeatureOrder | None:
    """Take the order of `to_arrays` out of some arrays; None without one."""
    if "order_numbers" not in arrays:
        return None
    numbers_MK, weights = torch.from_numpy(arrays.pop("order_numbers")), arrays.pop("order_weights", None)
    counts, features = tuple(arrays.pop("order_counts").tolist()), int(arrays.pop("order_features"))
    return FeatureOrder(numbers_MK, None if weights is None else torch.from_numpy(weights), counts, features)
