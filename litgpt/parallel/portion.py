"""What a rank works on of a batch: its tokens (context axis), and its rows of the vocabulary (tensor axis)."""

import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from litgpt.parallel.collectives import Group, all_gather_replicated, all_reduce_no_grad
from litgpt.parallel.context import EXCHANGES, Pieces
from litgpt.parallel.mesh import Mesh
from litgpt.recipe.parallel import ParallelArgs


class VocabularyRows:
    """The rows of the output matrix that lie on this rank of the tensor axis."""

    def __init__(self, group: Group, rows: int) -> None:
        self.group = group
        self.first = rows * dist.get_rank(group)

    def summed(self, values: Tensor) -> Tensor:
        """The sum over all parts of the vocabulary, without gradient."""
        return all_reduce_no_grad(values, self.group)

    def highest(self, values: Tensor) -> Tensor:
        """The highest over all parts of the vocabulary, without gradient."""
        return all_reduce_no_grad(values, self.group, dist.ReduceOp.MAX)

    def gathered(self, scores: Tensor) -> Tensor:
        """(..., V) out of the (..., rows) scores of every part."""
        return all_gather_replicated(scores, self.group, -1)


class Tokens:
    """The tokens of a batch that lie on this rank of the context axis; a row is lengthened until it goes round."""

    def __init__(self, mesh: Mesh, settings: ParallelArgs, vocabulary: VocabularyRows | None) -> None:
        self.vocabulary = vocabulary
        self.group, self.ranks = mesh.group("context"), mesh.dims.context
        self.pieces = Pieces(self.group, head_tail=settings.context_method != "ulysses")
        self.exchange = EXCHANGES[settings.context_method](self.group, self.pieces) if self.ranks > 1 else None
        self.sequence_ranks = mesh.dims.tensor if settings.sequence else 1
        self.multiple = self.sequence_ranks * (2 * self.ranks if self.ranks > 1 else 1)

    def padded(self, whole_BT: Tensor, fill: float) -> Tensor:
        """A batch lengthened at the right so that its tokens go round the ranks."""
        return F.pad(whole_BT, (0, -whole_BT.shape[-1] % self.multiple), value=fill)

    def own(self, whole_BT: Tensor, fill: float) -> Tensor:
        """(B, P), this rank's tokens of a batch."""
        return self.pieces.own(self.padded(whole_BT, fill), -1)

    def between_blocks(self, tokens: int) -> int:
        """Tokens of a row of so many that this rank has between blocks."""
        return -(-tokens // self.multiple) * self.multiple // (self.ranks * self.sequence_ranks)

    def together(self, own_BPD: Tensor) -> Tensor:
        """(B, T, D) in order, lengthening included, out of every rank's tokens."""
        return self.pieces.in_order(all_gather_replicated(own_BPD, self.group, 1), 1) if self.ranks > 1 else own_BPD
