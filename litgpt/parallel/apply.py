"""Make a model parallel in one fixed order: split, compile per block, then replicate or shard."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch._functorch import config as functorch
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.nn.parallel import DistributedDataParallel

from litgpt.parallel import expert
from litgpt.parallel.context_attention import build_local_tokens
from litgpt.parallel.mesh import Mesh
from litgpt.parallel.pipeline import Pipeline
from litgpt.parallel.precision import Precision
from litgpt.parallel.recompute import apply_recompute
from litgpt.parallel.ring_attention import check_ring_support
from litgpt.parallel.tensor import apply_tensor_parallel
from litgpt.recipe.parallel import ParallelArgs
from litgpt.recipe.recompute import RecomputeArgs


def parallelize(
    model: nn.Module,
    mesh: Mesh | None,
    settings: ParallelArgs,
    *,
    precision: Precision,
    compile_blocks: bool,
    recompute: RecomputeArgs | None = None,
) -> nn.Module:
    """Split, compile and shard a model that may still be on the meta device.

    Parameters that are split or sharded become DTensors. A model that is only replicated stays as it is until
    `replicate`.

    Args:
        model: has `blocks`, the units that are compiled and sharded one by one.
        mesh: None for one process.
        again: what is computed again in the backward pass; None for nothing.
    """
    if mesh is not None and is_sharded(mesh):
        split_model(model, mesh, settings, precision)
    apply_recompute(model, recompute or RecomputeArgs(), compiled=compile_blocks)
    if compile_blocks:
        if settings.pipeline_schedule == "zbv":
            functorch.donated_buffer = False  # each half of a backward pass looks at what is kept
        for block in model.local_blocks:  # type: ignore[union-attr]
            block.compile()
    if mesh is not None and is_sharded(mesh):
        apply_fsdp(model, mesh, settings, precision)
    return model


def split_model(model: nn.Module, mesh: Mesh, settings: ParallelArgs, precision: Precision) -> None:
    """Split what every batch is worked on with: layers, matrices, experts and tokens, each over axes of their own."""
    if mesh.dims.pipeline > 1:
        model.pipeline = Pipeline(model, mesh, settings, precision.compute or precision.storage)  # type: ignore
    vocabulary = apply_tensor_parallel(model, model.config, mesh, settings) if mesh.dims.tensor > 1 else None  # type: ignore[arg-type]
    expert.apply_expert_parallel(model, model.config, mesh, settings)  # type: ignore[arg-type]
    if mesh.dims.context > 1 and settings.context_method == "ring":
        check_ring_support(model.config, precision.compute or precision.storage, mesh.storage.device_type)  # type: ignore
    if mesh.dims.tensor * mesh.dims.context > 1:
        model.local_tokens = build_local_tokens(mesh, settings, vocabulary)  # type: ignore[assignment]


def apply_fsdp(model: nn.Module, mesh: Mesh, settings: ParallelArgs, precision: Precision) -> None:
    """Shard every block's parameters, and the rest's, over `mesh.fsdp_mesh`: those of experts over their own ranks."""
    policy = MixedPrecisionPolicy(param_dtype=precision.compute, reduce_dtype=precision.reduce)
    how: dict[str, Any] = {"mp_policy": policy}
    if settings.cpu_offload:
        how["offload_policy"] = CPUOffloadPolicy(pin_memory=torch.cuda.is_available())
    reshard = settings.level == 3
    for block in model.local_blocks:  # type: ignore[union-attr]
        if mesh.has_expert_mesh and block.experts is not None:
            expert.apply_expert_fsdp(block.experts, mesh, reshard_after_forward=reshard, **how)
        fully_shard(block, mesh=mesh.fsdp_mesh, reshard_after_forward=reshard, **how)
    fully_shard(model, mesh=mesh.fsdp_mesh, reshard_after_forward=False, **how)
    model.zero = settings.level  # type: ignore[assignment]
    if settings.prefetch:
        set_prefetch(model.local_blocks, settings.prefetch)  # type: ignore[arg-type]
    for module in _fsdp_modules(model):
        # a share of one mean over the whole global batch is summed, not averaged; gloo cannot scale while it sums
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)


def set_prefetch(blocks: Sequence[nn.Module], number: int) -> None:
    """Let each block gather the parameters of so many after it, or in backward before it, while it computes."""
    parts = [list(_fsdp_modules(block)) for block in blocks]
    for at, block in enumerate(blocks):
        assert isinstance(block, FSDPModule)
        after, before = parts[at + 1 : at + 1 + number], parts[max(0, at - number) : at]
        block.set_modules_to_forward_prefetch([module for part in after for module in part])
        block.set_modules_to_backward_prefetch([module for part in reversed(before) for module in part])


def is_sharded(mesh: Mesh | None) -> bool:
    """Whether `parallelize` shards: FSDP2 then also casts what is computed with."""
    return mesh is not None and not mesh.is_replicated_only


def apply_ddp(model: nn.Module, mesh: Mesh | None) -> nn.Module:
    """Wrap a materialized model so that its gradients are summed over the replicas, if that is how it is laid out."""
    if mesh is None or not mesh.is_replicated_only:
        return model
    group = mesh.group("data")
    wrapped = DistributedDataParallel(model, process_group=group, gradient_as_bucket_view=True)
    wrapped.register_comm_hook(group, _all_reduce_hook)
    return wrapped


def _all_reduce_hook(group: dist.ProcessGroup, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    work = dist.all_reduce(bucket.buffer(), group=group, async_op=True)
    return work.get_future().then(lambda done: done.value()[0])


def _fsdp_modules(model: nn.Module) -> Iterator[FSDPModule]:
    return (module for module in model.modules() if isinstance(module, FSDPModule))


def init_mixed_precision(model: nn.Module) -> None:
    """Let FSDP2 note number formats while all is trained that ever will be; it would do so at the first forward pass.

    What a group of tensors is reduced in follows from those that are trained then.
    """
    for module in _fsdp_modules(model):
        module.unshard()
        module.reshard()


@contextmanager
def accumulate_gradients(model: nn.Module, *, is_last: bool) -> Iterator[None]:
    """Forward and backward of one micro-batch; gradients meet those of the other ranks in the last one of a step.

    From level 2 of ZeRO on each micro-batch's gradients are reduced at once, since keeping them whole would undo the
    sharding; at level 1 they, and gathered parameters, stay whole until the end of the step.
    """
    once = getattr(unwrap_model(model), "zero", None) == 1
    for module in _fsdp_modules(model):
        module.set_is_last_backward(is_last)
        if once:
            module.set_reshard_after_backward(is_last, recurse=False)
            module.set_requires_gradient_sync(is_last, recurse=False)
    with model.no_sync() if isinstance(model, DistributedDataParallel) and not is_last else nullcontext():
        yield


def reshard_parameters(model: nn.Module) -> None:
    """Free what was gathered to look at a model, so that its parameters are shards again."""
    for module in _fsdp_modules(model):
        module.reshard()


@contextmanager
def accumulate_pipeline_gradients(model: nn.Module, *, sync_each: bool) -> Iterator[None]:
    """Forwards and backwards of all micro-batches of a step in any order; gradients meet those of others at the end.

    Args:
        sync_each: all-gather parameters and reduce gradients in every micro-batch; else both stay whole until the end.
    """
    for module in _fsdp_modules(model):
        module.set_is_last_backward(False)
        module.set_reshard_after_backward(sync_each, recurse=False)
        module.set_requires_gradient_sync(sync_each, recurse=False)
    yield
    for module in _fsdp_modules(model):
        module.set_is_last_backward(True)
        module.set_reshard_after_backward(True, recurse=False)
        module.set_requires_gradient_sync(True, recurse=False)
    state = fully_shard.state(model)  # type: ignore[attr-defined]
    for group in (group for one in state._state_ctx.all_states for group in one._fsdp_param_groups):
        group.post_backward()
    state._root_post_backward_final_callback()


def copy_full_tensor(parameter: torch.Tensor, value: torch.Tensor) -> None:
    """Copy a full tensor into a parameter, of which this rank may hold a shard only."""
    with torch.no_grad():
        if not isinstance(parameter, DTensor):
            parameter.copy_(value)
            return
        local, spread = parameter.to_local(), (parameter.device_mesh, parameter.placements)
        _, starts = compute_local_shape_and_global_offset(parameter.shape, *spread)
        local.copy_(value[tuple(slice(at, at + size) for at, size in zip(starts, local.shape, strict=True))])


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The whole tensor on every rank, whatever its layout."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def unwrap_model(model: Any) -> nn.Module:
    """The model itself, without the wrapper that sums gradients over replicas."""
    return model.module if isinstance(model, DistributedDataParallel) else model
