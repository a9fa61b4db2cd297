"""Sums and norms over any mix of plain and sharded tensors, the same on every rank."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement


def all_reduce_sum(values: Iterable[float], device: torch.device) -> list[float]:
    """The sum of each value over all ranks, in float64."""
    summed = torch.tensor(list(values), dtype=torch.float64, device="cpu" if device.type == "mps" else device)
    if dist.is_initialized():
        dist.all_reduce(summed)
    return summed.tolist()


def all_gather_objects(value: Any) -> list[Any]:
    """A value of every process, in the order of their ranks."""
    if not dist.is_initialized():
        return [value]
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def compute_gradient_norm(parameters: Iterable[torch.nn.Parameter]) -> torch.Tensor:
    """The L2 norm of all gradients as one vector, a scalar equal on every rank."""
    alike: dict[tuple[DeviceMesh | None, tuple[Placement, ...]], list[torch.Tensor]] = {}
    for parameter in parameters:
        if isinstance(gradient := parameter.grad, DTensor):
            alike.setdefault((gradient.device_mesh, gradient.placements), []).append(gradient.to_local())
        elif gradient is not None:
            alike.setdefault((None, ()), []).append(gradient)
    norms = [_norm_over(mesh, placements, parts) for (mesh, placements), parts in alike.items()]
    return torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros(())


def _norm_over(mesh: DeviceMesh | None, placements: tuple[Placement, ...], parts: list[torch.Tensor]) -> torch.Tensor:
    """The L2 norm of tensors that lie alike. DTensor would plan this for seconds on a mesh of many axes."""
    norm = torch.nn.utils.get_total_norm(parts)
    if mesh is None:
        return norm
    square = norm.to(mesh.device_type, torch.float64).square()
    for axis, placement in enumerate(placements):
        assert not placement.is_partial(), placement
        if not placement.is_replicate() and mesh.size(axis) > 1:
            dist.all_reduce(square, group=mesh.get_group(axis))
    return square.sqrt().to(norm.dtype)


def scale_gradients(parameters: Iterable[torch.nn.Parameter], factor: torch.Tensor | float) -> None:
    """Multiply every gradient by one number."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    local = [gradient.to_local() if isinstance(gradient, DTensor) else gradient for gradient in gradients]
    if local:
        torch._foreach_mul_(local, factor)
