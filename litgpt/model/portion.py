"""What one process works on of a batch that others work on with it: tokens of every row, and rows of the vocabulary.

Axes: B batch, T tokens, P tokens of this process, D model width, V vocabulary.
"""

from typing import Protocol

from torch import Tensor

from litgpt.model.attention import Exchange


class Vocabulary(Protocol):
    """Rows of the output matrix that lie here, and how to put together what all rows give.

    Attributes:
        first: the number of the first row.
    """

    first: int

    def summed(self, values: Tensor) -> Tensor:
        """The sum over all parts of the vocabulary, without gradient."""

    def highest(self, values: Tensor) -> Tensor:
        """The highest over all parts of the vocabulary, without gradient."""

    def gathered(self, scores: Tensor) -> Tensor:
        """(..., V) out of the (..., rows) scores of every part."""


class Portion(Protocol):
    """A process's tokens and rows of the vocabulary; a model that has one is given whole batches and picks its own.

    Attributes:
        vocabulary: None where all rows lie here.
        exchange: how attention sees tokens of other processes; None where they are here by then.
    """

    vocabulary: Vocabulary | None
    exchange: Exchange | None

    def padded(self, whole_BT: Tensor, fill: float) -> Tensor:
        """A batch lengthened at the right so that its tokens go round the processes."""

    def own(self, whole_BT: Tensor, fill: float) -> Tensor:
        """(B, P), this process's tokens of a batch, which is lengthened by `fill` where it does not go round."""

    def between_blocks(self, tokens: int) -> int:
        """How many of the tokens of a row this process has between blocks."""

    def together(self, own_BPD: Tensor) -> Tensor:
        """(B, T, D) in order, lengthening included, out of every process's tokens."""
