"""Optimizer states in the layout of their parameters."""

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

from litgpt.parallel.apply import copy_full_tensor
from litgpt.parallel.exchange import get_local_tensor


def zeros_in_layout(parameter: Tensor, dtype: torch.dtype, device: torch.device, *, values: int = 1) -> Tensor:
    """Zeros in the layout of a parameter, with one element for every `values` along its last dim.

    Args:
        device: of the zeros, also if it is not that of the mesh.
        values: divides the last dim of the parameter on every rank.
    """

    def shorten(shape: torch.Size) -> torch.Size:
        return torch.Size((*shape[:-1], shape[-1] // values)) if values > 1 else shape

    local = torch.zeros(shorten(get_local_tensor(parameter).shape), dtype=dtype, device=device)
    if not isinstance(parameter, DTensor):
        return local
    shape = shorten(parameter.shape)
    meta = TensorMeta(shape, torch.empty(shape, device="meta").stride(), dtype)
    spec = DTensorSpec(parameter.device_mesh, parameter.placements, meta)
    return DTensor(local, spec, requires_grad=False)


def shard_scales(scales: Tensor, parameter: Tensor, values: int) -> Tensor:
    """Shard full scales of a sharded parameter, which are of larger blocks; return all others as they are.

    Args:
        values: the number of values of a block in the layout of the parameter.
    """
    if isinstance(scales, DTensor) or not isinstance(parameter, DTensor):
        return scales
    sharded = zeros_in_layout(parameter, scales.dtype, scales.device, values=values)
    copy_full_tensor(sharded, scales.repeat_interleave(sharded.shape[-1] // scales.shape[-1], -1))
    return sharded
