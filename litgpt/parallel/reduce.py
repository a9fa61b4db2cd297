"""Sums over ranks, and norms over any mix of plain and sharded tensors; equal on every rank."""

from collections.abc import Iterable
from functools import reduce
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement

Layout = tuple[DeviceMesh | None, tuple[Placement, ...]]


def all_reduce_sum(values: Iterable[float], device: torch.device) -> list[float]:
    """The sum of each value over all ranks, in float64."""
    summands = [float(value) for value in values]
    if not dist.is_initialized():
        return summands  # without waiting for the device
    sums = torch.tensor(summands, dtype=torch.float64, device=get_sum_device(device))
    dist.all_reduce(sums)
    return sums.tolist()


def get_sum_device(device: torch.device) -> torch.device:
    """Where sums in float64 are computed, which MPS does not have."""
    return torch.device("cpu") if device.type == "mps" else device


def all_reduce_max(values: torch.Tensor) -> torch.Tensor:
    """The largest value of each element over all ranks."""
    if dist.is_initialized():
        values = values.clone()
        dist.all_reduce(values, dist.ReduceOp.MAX)
    return values


def all_gather_objects(value: Any) -> list[Any]:
    """A picklable value of every process, in the order of ranks."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def compute_gradient_norm(parameters: Iterable[torch.nn.Parameter]) -> torch.Tensor:
    """The L2 norm of all gradients as one vector; a scalar, equal on every rank."""
    groups = _group_by_layout(parameter.grad for parameter in parameters if parameter.grad is not None)
    return _combine_norms([_norm_over_mesh(*layout, tensors) for layout, tensors in groups.items()])


def compute_parameter_norm(parameters: Iterable[torch.nn.Parameter]) -> torch.Tensor:
    """The L2 norm of all parameters as one vector, in float32 or more; a scalar, equal on every rank."""
    norms = []
    for layout, tensors in _group_by_layout(parameter.detach() for parameter in parameters).items():
        dtype = reduce(torch.promote_types, (tensor.dtype for tensor in tensors), torch.float32)
        local = [torch.linalg.vector_norm(tensor, dtype=dtype) for tensor in tensors]  # without copies in float32
        norms.append(_norm_over_mesh(*layout, local))
    return _combine_norms(norms)


def _group_by_layout(tensors: Iterable[torch.Tensor]) -> dict[Layout, list[torch.Tensor]]:
    """This rank's part of each tensor, by layout."""
    groups: dict[Layout, list[torch.Tensor]] = {}
    for tensor in tensors:
        if isinstance(tensor, DTensor):
            groups.setdefault((tensor.device_mesh, tensor.placements), []).append(tensor.to_local())
        else:
            groups.setdefault((None, ()), []).append(tensor)
    return groups


def _combine_norms(norms: list[torch.Tensor]) -> torch.Tensor:
    """The norm of several vectors as one."""
    return torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros(())


def _norm_over_mesh(
    mesh: DeviceMesh | None, placements: tuple[Placement, ...], tensors: list[torch.Tensor]
) -> torch.Tensor:
    """The L2 norm of local tensors of one layout. DTensor takes seconds to plan this on a mesh of many axes."""
    norm = torch.nn.utils.get_total_norm(tensors)
    if mesh is None:
        return norm
    square = norm.to(mesh.device_type, torch.float64).square()
    for axis, placement in enumerate(placements):
        assert not placement.is_partial(), placement
        if not placement.is_replicate() and mesh.size(axis) > 1:
            dist.all_reduce(square, group=mesh.get_group(axis))
    return square.sqrt().to(norm.dtype)


def scale_gradients(parameters: Iterable[torch.nn.Parameter], factor: torch.Tensor | float) -> None:
    """Multiply every gradient by a factor, in place."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    local = [gradient.to_local() if isinstance(gradient, DTensor) else gradient for gradient in gradients]
    if local:
        torch._foreach_mul_(local, factor)
