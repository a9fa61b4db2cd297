"""The rows of experts on fake tensors, which have no loads to read: as many on each rank, or more on the busiest."""

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

from torch import Tensor

from litgpt.model import fp8
from litgpt.model.moe import PartialPermutation
from litgpt.parallel.expert import AllGatherDispatcher, AllToAllDispatcher, TokenDispatcher


@dataclass(frozen=True)
class RoutedRows:
    """The answers to what the host reads about the rows of experts.

    Every rank sends as many rows as any other. All ranks of the dispatch group are alike, but for the busiest.

    Attributes:
        skew: rows of the busiest rank relative to the mean, from 1 to the number of ranks with different experts.
        capacity: of an expert, in tokens per its share of all; None for no limit.
    """

    skew: float = 1.0
    capacity: float | None = None

    def count_received(self, dispatcher: TokenDispatcher) -> int:
        """The number of rows from each rank for the experts of the busiest one."""
        groups = dispatcher.ranks // dispatcher.holders
        return min(dispatcher.rows, math.ceil(dispatcher.rows * self.skew / groups))

    def read_splits(
        self, dispatcher: AllToAllDispatcher, sent_P: Tensor, received_P: Tensor
    ) -> tuple[list[int], list[int]]:
        """As `AllToAllDispatcher.read_splits`."""
        groups = len(sent_P) // dispatcher.holders
        share, rest = divmod(dispatcher.rows, groups)
        sent = [share + (group < rest) for group in range(groups) for _ in range(dispatcher.holders)]
        return sent, [self.count_received(dispatcher)] * len(received_P)

    def read_local_rows(self, dispatcher: AllGatherDispatcher) -> int:
        """As `AllGatherDispatcher.read_local_rows`."""
        return self.count_received(dispatcher) * dispatcher.ranks

    def read_rows(self, permutation: PartialPermutation) -> int:
        """As `PartialPermutation.read_rows`."""
        return math.ceil(permutation.order_R.numel() * min(1.0, self.capacity or 1.0))

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The context in which the host reads these answers."""
        answers: list[tuple[Any, str, Any]] = [  # functions, which become methods, unlike bound ones
            (AllToAllDispatcher, "read_splits", lambda *args: self.read_splits(*args)),
            (AllGatherDispatcher, "read_longest", lambda dispatcher, _rows_P: dispatcher.rows),
            (AllGatherDispatcher, "read_local_rows", lambda *args: self.read_local_rows(*args)),
            (PartialPermutation, "read_rows", lambda *args: self.read_rows(*args)),
            (fp8, "split_by_expert", split_evenly),
        ]
        with ExitStack() as stack:
            for owner, name, answer in answers:
                stack.enter_context(patch.object(owner, name, answer))
            yield


def split_evenly(x_RI: Tensor, ends_E: Tensor) -> Sequence[Tensor]:
    """As many rows for each expert."""
    return x_RI.tensor_split(len(ends_E))
