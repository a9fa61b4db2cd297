"""Context parallelism: every row's tokens are split over ranks, which meet in attention only.

Axes: B batch, H heads, K key-value heads, T tokens of a row, P tokens of this rank, S numbers of a head.
"""

from collections.abc import Callable, Sequence
from functools import partial
from math import gcd

import torch
import torch.distributed as dist
from torch import Tensor

from litgpt.errors import UserError
from litgpt.model.attention import Shared
from litgpt.parallel.collectives import Group, all_gather, all_to_all
from litgpt.parallel.ring import INSTEAD, around

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


class AnyMask:
    """Exchanges after which a rank attends by masks, whatever they say."""

    def check(self, shared: Shared) -> None:
        """All will do."""


class KeysGathered(AnyMask):
    """Each rank has all keys and values for the time of attention, and queries of its own tokens."""

    def __init__(self, group: Group, pieces: Pieces) -> None:
        self.group, self.own, self.queries, self.pieces = group, pieces.own, pieces.places, pieces

    def __call__(self, attend: Attend, q_BHPS: Tensor, k_BKPS: Tensor, v_BKPS: Tensor, sinks: Tensor | None) -> Tensor:
        """(B, H, P, S), what this rank's queries find."""
        k_BKTS, v_BKTS = (self.pieces.in_order(all_gather(own, self.group, 2), 2) for own in (k_BKPS, v_BKPS))
        return attend(q_BHPS, k_BKTS, v_BKTS, sinks=sinks)


class HeadsForTokens(AnyMask):
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
        return all_to_all(parts, self.group, ones, ones).movedim(0, joined).flatten(joined, joined + 1)


class KeysInARing:
    """Each rank has the keys and values of one rank after the other, and queries of its own tokens.

    No rank ever holds those of a whole row. A query must see all that comes before it, and be one of a plain softmax.
    """

    def __init__(self, group: Group, pieces: Pieces) -> None:
        self.group, self.own = group, pieces.own

    def queries(self, tokens: int) -> None:
        """Everywhere: what `check` looks at is that of whole rows."""

    def check(self, shared: Shared) -> None:
        """Refuse all but rows that are attended to as a whole.

        Raises:
            UserError: if rows hold several documents, or more tokens than a window.
        """
        parts = shared.parts or ()
        masks = [mask for of_kinds in (shared.masks, *(part.masks for part in parts)) for mask in of_kinds.values()]
        if len(parts) > 1 or any(mask is not None for mask in masks):
            raise UserError(
                "parallel.context_method: ring attends to whole rows, and here some hold several documents, or more "
                f"tokens than a window; {INSTEAD}"
            )

    def __call__(
        self, attend: partial[Tensor], q_BHPS: Tensor, k_BKPS: Tensor, v_BKPS: Tensor, sinks: Tensor | None
    ) -> Tensor:
        """(B, H, P, S), what this rank's queries find."""
        return around(q_BHPS, k_BKPS, v_BKPS, self.group, attend.keywords["scale"])


EXCHANGES = {"all-gather": KeysGathered, "ulysses": HeadsForTokens, "ring": KeysInARing}
