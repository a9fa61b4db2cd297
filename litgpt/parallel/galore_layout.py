"""Matrices that are spread over ranks, times small ones: how the small ones lie."""

from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import Placement

from litgpt.errors import UserError


def check_galore_layout(matrix: Tensor) -> None:
    """Refuse matrices that are spread otherwise than whole, or along one of their dims.

    Raises:
        UserError: if tensor parallelism splits them.
    """
    if isinstance(matrix, DTensor):
        shards = [placement for placement in matrix.placements if not placement.is_replicate()]
        if len(shards) > 1 or any(type(placement) is not Shard for placement in shards):
            raise UserError("optimizer: GaLore does not know matrices split by parallel.tensor; set parallel.tensor: 1")


def distribute_basis(matrix: Tensor, basis: Tensor, *, left: bool) -> Tensor:
    """A basis, whole and alike on all ranks, laid out to be multiplied with the matrices that it belongs to.

    Args:
        matrix: (..., M, N).
        basis: (..., M, R) from the left, (..., N, R) from the right.
    """
    if not isinstance(matrix, DTensor) or isinstance(basis, DTensor):
        return basis
    rows, side = matrix.dim() - 2, matrix.dim() - 1 - left

    def placed(placement: Placement) -> Placement:
        if not isinstance(placement, Shard) or placement.dim < rows:
            return placement
        return Shard(rows) if placement.dim == side else Replicate()

    spread = [placed(placement) for placement in matrix.placements]
    return distribute_tensor(basis, matrix.device_mesh, spread, src_data_rank=None)


def reduce_partial(product: Tensor) -> Tensor:
    """A product with what ranks have each a part of added up."""
    if not isinstance(product, DTensor):
        return product
    return product.redistribute(placements=[Replicate() if one.is_partial() else one for one in product.placements])


def distribute_like(value: Tensor, laid_out: Tensor) -> Tensor:
    """A whole tensor, alike on all ranks, laid out as another."""
    if not isinstance(laid_out, DTensor) or isinstance(value, DTensor):
        return value
    return distribute_tensor(value, laid_out.device_mesh, laid_out.placements, src_data_rank=None)
