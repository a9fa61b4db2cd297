"""Layouts of GaLore's bases and moments for sharded matrices."""

from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import Placement

from litgpt.errors import UserError


def check_galore_layout(matrix: Tensor) -> None:
    """Check that a matrix is replicated, or sharded along one of its dims.

    Raises:
        UserError: if it is split by tensor parallelism.
    """
    if isinstance(matrix, DTensor):
        shards = [placement for placement in matrix.placements if not placement.is_replicate()]
        if len(shards) > 1 or any(type(placement) is not Shard for placement in shards):
            raise UserError("optimizer: GaLore is not supported with parallel.tensor; set parallel.tensor: 1")


def distribute_basis(matrix: Tensor, basis: Tensor, *, left: bool) -> Tensor:
    """Distribute a basis, equal on all ranks, so that it can be multiplied with its matrix.

    Args:
        matrix: (..., M, N), which may be a DTensor.
        basis: (..., M, R) if `left`, else (..., N, R).
    """
    if not isinstance(matrix, DTensor) or isinstance(basis, DTensor):
        return basis
    row_dim, basis_dim = matrix.dim() - 2, matrix.dim() - 1 - left

    def place(placement: Placement) -> Placement:
        if not isinstance(placement, Shard) or placement.dim < row_dim:
            return placement
        return Shard(row_dim) if placement.dim == basis_dim else Replicate()

    placements = [place(placement) for placement in matrix.placements]
    return distribute_tensor(basis, matrix.device_mesh, placements, src_data_rank=None)


def reduce_partial(product: Tensor) -> Tensor:
    """Sum a product over the ranks that have partial sums of it."""
    if not isinstance(product, DTensor):
        return product
    placements = [Replicate() if placement.is_partial() else placement for placement in product.placements]
    return product.redistribute(placements=placements)


def distribute_like(value: Tensor, reference: Tensor) -> Tensor:
    """Give a tensor, equal on all ranks, the layout of a reference."""
    if not isinstance(reference, DTensor) or isinstance(value, DTensor):
        return value
    return distribute_tensor(value, reference.device_mesh, reference.placements, src_data_rank=None)
