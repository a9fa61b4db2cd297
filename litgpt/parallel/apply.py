"""Make a model parallel in one fixed order: compile per block, then replicate or shard."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from litgpt.parallel.precision import Precision


def parallelize(
    model: nn.Module,
    mesh: DeviceMesh | None,
    *,
    precision: Precision,
    compile_blocks: bool,
    reshard_after_forward: bool | Literal["auto"] = "auto",
) -> nn.Module:
    """Compile and shard a model that may still be on the meta device.

    Parameters sharded here become DTensors. A model that is only replicated stays as it is until `replicate`.

    Args:
        model: has `blocks`, the units that are compiled and sharded one by one.
        mesh: of `strategy.AXES`, or None for one process.
        reshard_after_forward: True frees gathered parameters after the forward pass (ZeRO-3), False keeps them
            until the backward pass has used them (ZeRO-2); auto is True for blocks.
    """
    if compile_blocks:
        for block in model.blocks:  # type: ignore[union-attr]
            block.compile()
    if mesh is not None and mesh["data_shard"].size() > 1:
        policy = MixedPrecisionPolicy(param_dtype=precision.compute, reduce_dtype=precision.reduce)
        axes = mesh if mesh["data_replicate"].size() > 1 else mesh["data_shard"]
        reshard = reshard_after_forward is not False
        for block in model.blocks:  # type: ignore[union-attr]
            fully_shard(block, mesh=axes, mp_policy=policy, reshard_after_forward=reshard)
        fully_shard(model, mesh=axes, mp_policy=policy, reshard_after_forward=False)
        for module in _sharded(model):
            # a share of one mean over the whole global batch is summed, not averaged; gloo cannot scale while it sums
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    return model


def replicate(model: nn.Module, mesh: DeviceMesh | None) -> nn.Module:
    """Wrap a materialized model so that its gradients are summed over the replicas, if that is how it is laid out."""
    if mesh is None or mesh["data_shard"].size() > 1 or mesh.size() == 1:
        return model
    group = mesh["data_replicate"].get_group()
    wrapped = DistributedDataParallel(model, process_group=group, gradient_as_bucket_view=True)
    wrapped.register_comm_hook(group, _sum_over_replicas)
    return wrapped


def _sum_over_replicas(group: dist.ProcessGroup, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    work = dist.all_reduce(bucket.buffer(), group=group, async_op=True)
    return work.get_future().then(lambda done: done.value()[0])


def _sharded(model: nn.Module) -> Iterator[FSDPModule]:
    return (module for module in model.modules() if isinstance(module, FSDPModule))


@contextmanager
def backward_of(model: nn.Module, *, last: bool) -> Iterator[None]:
    """Forward and backward of one micro-batch; gradients meet those of the other ranks in the last one of a step.

    Under ZeRO-3 each micro-batch's gradients are reduced at once, since keeping them whole would undo the sharding.
    """
    for module in _sharded(model):
        module.set_is_last_backward(last)
    with model.no_sync() if isinstance(model, DistributedDataParallel) and not last else nullcontext():
        yield


def place(parameter: torch.Tensor, value: torch.Tensor) -> None:
    """Copy a full tensor into a parameter, of which this rank may hold a shard only."""
    with torch.no_grad():
        if isinstance(parameter, DTensor):
            value = distribute_tensor(
                value.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None
            )
        parameter.copy_(value)


def full(tensor: torch.Tensor) -> torch.Tensor:
    """The whole tensor on every rank, whatever its layout."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def unwrapped(model: Any) -> nn.Module:
    """The model itself, without the wrapper that sums gradients over replicas."""
    return model.module if isinstance(model, DistributedDataParallel) else model
