"""Computations on the full matrices of sharded parameters, divided among the ranks that share them."""

from collections.abc import Callable, Iterator, Sequence
from math import prod

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from litgpt.parallel.exchange import get_local_tensor

STACK_NUMEL = 1 << 20  # elements of small matrices that are stacked: a call for each costs more than its products

MatrixSplit = tuple[DeviceMesh, int, int]
"""A mesh of one axis, the dim that is sharded over it (-2 or -1), and the size of that dim before."""


def list_splits(parameter: Tensor) -> list[MatrixSplit]:
    """How the matrices of a parameter (..., M, N) are split over ranks, the innermost split first.

    FSDP2, the first axis, shards what the other axes have sharded (as `_StridedShard` if that is the same dim).
    """
    if not isinstance(parameter, DTensor):
        return []
    mesh, splits = parameter.device_mesh, []
    dims = [get_dim(placement, parameter.dim()) for placement in parameter.placements]
    for axis, dim in enumerate(dims):
        if dim is not None and mesh.size(axis) > 1:
            outer = [mesh.size(other) for other in range(axis + 1, mesh.ndim) if dims[other] == dim]
            is_strided = isinstance(parameter.placements[axis], _StridedShard)
            assert is_strided == (prod(outer) > 1), parameter.placements
            one_axis = mesh if mesh.ndim == 1 else mesh[(mesh.mesh_dim_names or ())[axis]]
            splits.append((one_axis, dim, parameter.shape[dim] // prod(outer)))
    return splits


def get_dim(placement: Placement, dims: int) -> int | None:
    """The dim of matrices that a placement shards, -2 or -1; None if it leaves each matrix whole."""
    assert not placement.is_partial()
    dim = getattr(placement, "dim", 0) - dims
    return dim if dim >= -2 and not isinstance(placement, Replicate) else None


def batch_matrices(parameters: Sequence[Tensor]) -> Iterator[list[int]]:
    """Group the indices of parameters of one shape and layout, as many as give every rank a matrix or fill a stack."""
    groups: dict[object, list[int]] = {}
    for index, parameter in enumerate(parameters):
        layout = (parameter.device_mesh, parameter.placements) if isinstance(parameter, DTensor) else None
        groups.setdefault((parameter.shape, parameter.dtype, layout), []).append(index)
    for indices in groups.values():
        parameter = parameters[indices[0]]
        ranks = prod(mesh.size() for mesh, _, _ in list_splits(parameter))
        matrices = prod(get_local_tensor(parameter).shape[:-2])
        small = STACK_NUMEL // max(1, parameter.numel()) if ranks == 1 else 0
        size = max(1, ranks // max(1, matrices), small)
        yield from (indices[start : start + size] for start in range(0, len(indices), size))


def map_full_matrices(
    function: Callable[[Tensor], Tensor], parameters: Sequence[Tensor], values: Sequence[Tensor]
) -> list[Tensor]:
    """Apply a function to full matrices, each on one of the ranks that have a shard of it.

    Args:
        function: of matrices (B, M, N), which keeps their shape.
        parameters: of one shape (..., M, N) and layout.
        values: local tensors in the layout of the parameters.

    Returns:
        this rank's shards of the results.
    """
    shapes = [value.shape for value in values]
    stacked = torch.cat([value.reshape(prod(value.shape[:-2]), *value.shape[-2:]) for value in values])
    results = _map_stack(function, stacked, list_splits(parameters[0]))
    parts = results.split([prod(shape[:-2]) for shape in shapes])
    return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]


def _map_stack(function: Callable[[Tensor], Tensor], stack: Tensor, splits: list[MatrixSplit]) -> Tensor:
    """Exchange the split of matrices for one of the stack, axis by axis, and back after the function."""
    if not splits:
        return function(stack) if len(stack) else stack
    (mesh, dim, size), *others = splits
    shape = list(stack.shape)
    shape[dim] = size
    by_part = redistribute(stack, mesh, dim % 3, 0, shape)
    results = _map_stack(function, by_part, others)
    return redistribute(results, mesh, 0, dim % 3, shape)


def redistribute(local: Tensor, mesh: DeviceMesh, source: int, target: int, shape: list[int]) -> Tensor:
    """Exchange the shards of a tensor along one dim for those along another.

    Args:
        shape: of the full tensor.
    """
    stride = torch.empty(shape, device="meta").stride()
    tensor = DTensor.from_local(
        local.contiguous(), mesh, (Shard(source),), run_check=False, shape=torch.Size(shape), stride=stride
    )
    return tensor.redistribute(placements=(Shard(target),)).to_local()
