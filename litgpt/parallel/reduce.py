"""Sums and norms over any mix of plain and sharded tensors, the same on every rank."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor


def total(values: Iterable[float], device: torch.device) -> list[float]:
    """The sum of each value over all ranks, in float64."""
    summed = torch.tensor(list(values), dtype=torch.float64, device="cpu" if device.type == "mps" else device)
    if dist.is_initialized():
        dist.all_reduce(summed)
    return summed.tolist()


def everyone(value: Any) -> list[Any]:
    """A value of every process, in the order of their ranks."""
    if not dist.is_initialized():
        return [value]
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def gradient_norm(parameters: Iterable[torch.nn.Parameter]) -> torch.Tensor:
    """The L2 norm of all gradients as one vector, a scalar equal on every rank."""
    by_mesh: dict[Any, list[torch.Tensor]] = {}
    for parameter in parameters:
        if (gradient := parameter.grad) is not None:
            by_mesh.setdefault(gradient.device_mesh if isinstance(gradient, DTensor) else None, []).append(gradient)
    norms = [torch.nn.utils.get_total_norm(gradients) for gradients in by_mesh.values()]
    whole = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    return torch.linalg.vector_norm(torch.stack(whole)) if whole else torch.zeros(())


def scale_gradients(parameters: Iterable[torch.nn.Parameter], factor: torch.Tensor | float) -> None:
    """Multiply every gradient by one number."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    local = [gradient.to_local() if isinstance(gradient, DTensor) else gradient for gradient in gradients]
    if local:
        torch._foreach_mul_(local, factor)
