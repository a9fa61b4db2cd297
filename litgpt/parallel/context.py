"""Context parallelism: every row's tokens are split over ranks, which meet in attention only.

Axes: B batch, H heads, K key-value heads, T tokens of a row, P tokens of this rank, S numbers of a head.
"""

from collections.abc import Callable, Sequence
from math import gcd

import torch
import torch.distributed as dist
from torch import Tensor

from litgpt.errors import UserError
from litgpt.parallel.collectives import Group, exchanged, gathered

Attend = Callable[..., Tensor]


class Pieces:
    """Which tokens of a row are whose: a row has two pieces for each rank.

    If `head_tail`, rank r of c has the pieces r and 2 c - 1 - r: one with few keys to look back on and one with many,
    so that all ranks have as much to do (Llama Team 2024, section 3.3.2). Else its pieces are neighbours.
    """

    def __init__(self, group: Group, *, head_tail: bool) -> None:
        self.ranks, self.rank = dist.get_world_size(group), dist.get_rank(group)
        last = 2 * self.ranks - 1
        numbers = range(self.ranks)
        self.of_rank = [(n, last - n) if head_tail else (2 * n, 2 * n + 1) for n in numbers]

    def own(self, whole: Tensor, dim: int) -> Tensor:
        """This rank's part along a dim that goes round."""
        if self.ranks == 1:
            return whole
        pieces = whole.chunk(2 * self.ranks, dim)
        return torch.cat([pieces[number] for number in self.of_rank[self.rank]], dim)

    def in_order(self, everything: Tensor, dim: int) -> Tensor:
        """What all ranks have, rank by rank, in the order of tokens."""
        numbers = [number for pair in self.of_rank for number in pair]
        if numbers == sorted(numbers):
            return everything
        pieces = everything.chunk(2 * self.ranks, dim)
        return torch.cat([pieces[numbers.index(number)] for number in range(2 * self.ranks)], dim)

    def places(self, tokens: int) -> list[range]:
        """Where this rank's pieces are in a row of so many tokens."""
        size = tokens // (2 * self.ranks)
        return [range(number * size, (number + 1) * size) for number in self.of_rank[self.rank]]


class KeysGathered:
    """Each rank has all keys and values for the time of attention, and queries of its own tokens."""

    def __init__(self, group: Group, pieces: Pieces) -> None:
        self.group, self.own, self.queries, self.pieces = group, pieces.own, pieces.places, pieces

    def __call__(self, attend: Attend, q_BHPS: Tensor, k_BKPS: Tensor, v_BKPS: Tensor, sinks: Tensor | None) -> Tensor:
        """(B, H, P, S), what this rank's queries find."""
        k_BKTS, v_BKTS = (self.pieces.in_order(gathered(own, self.group, 2), 2) for own in (k_BKPS, v_BKPS))
        return attend(q_BHPS, k_BKTS, v_BKTS, sinks=sinks)


class HeadsForTokens:
    """Each rank has all tokens of some heads for the time of attention (Jacobs et al. 2023, DeepSpeed Ulysses)."""

    def __init__(self, group: Group, pieces: Pieces) -> None:
        self.group, self.own, self.ranks, self.rank = group, pieces.own, pieces.ranks, pieces.rank

    def queries(self, tokens: int) -> Sequence[range] | None:
        """Everywhere."""
        return None

    def __call__(self, attend: Attend, q_BHPS: Tensor, k_BKPS: Tensor, v_BKPS: Tensor, sinks: Tensor | None) -> Tensor:
        """(B, H, P, S), what this rank's queries find.

        Raises:
            UserError: if heads do not go round.
        """
        if (heads := q_BHPS.shape[1]) % self.ranks:
            raise UserError(
                f"parallel.context: {self.ranks} does not divide the {heads} heads of a device, which context_method: "
                "ulysses asks for; set context_method: all-gather"
            )
        copies = self.ranks // gcd(k_BKPS.shape[1], self.ranks)
        k_BKPS, v_BKPS = (part.repeat_interleave(copies, dim=1) for part in (k_BKPS, v_BKPS))
        q, k, v = (self._turned(part, 1, 2) for part in (q_BHPS, k_BKPS, v_BKPS))
        if sinks is not None:
            sinks = sinks.chunk(self.ranks)[self.rank]
        return self._turned(attend(q, k, v, sinks=sinks), 2, 1)

    def _turned(self, x: Tensor, cut: int, joined: int) -> Tensor:
        """A tensor of which every rank has a part along `joined`; afterwards it has one along `cut`."""
        ones = [1] * self.ranks
        parts = x.unflatten(cut, (self.ranks, -1)).movedim(cut, 0)
        return exchanged(parts, self.group, ones, ones).movedim(0, joined).flatten(joined, joined + 1)


EXCHANGES = {"all-gather": KeysGathered, "ulysses": HeadsForTokens}
