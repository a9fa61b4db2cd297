"""Apply parallelism to a model in one fixed order: split it, compile its blocks, then shard or replicate it."""

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

from litgpt.model.gpt import GPT
from litgpt.model.moe import Router
from litgpt.parallel.context_attention import build_local_tokens
from litgpt.parallel.expert import apply_expert_fsdp, apply_expert_parallel
from litgpt.parallel.mesh import Mesh
from litgpt.parallel.pipeline import Pipeline
from litgpt.parallel.precision import Precision
from litgpt.parallel.recompute import apply_recompute
from litgpt.parallel.ring_attention import check_ring_support
from litgpt.parallel.tensor import apply_tensor_parallel
from litgpt.recipe.parallel import ParallelArgs
from litgpt.recipe.recompute import RecomputeArgs


def parallelize(
    model: GPT,
    mesh: Mesh | None,
    settings: ParallelArgs,
    *,
    precision: Precision,
    compile_blocks: bool,
    recompute: RecomputeArgs | None = None,
) -> None:
    """Split, compile and shard a model in place, which may be on the meta device.

    Split or sharded parameters become DTensors. A model that is only replicated is wrapped by `apply_ddp`, once it has
    values.

    Args:
        mesh: None for a single process.
        compile_blocks: compile each block with `torch.compile`.
        recompute: the activations to recompute in the backward pass; None for none.
    """
    if mesh is not None and is_sharded(mesh):
        split_model(model, mesh, settings, precision)
    apply_recompute(model, recompute or RecomputeArgs(), compiled=compile_blocks)
    if compile_blocks:
        if settings.pipeline_schedule == "zbv":
            functorch.donated_buffer = False  # both halves of a backward pass need the saved tensors
        for block in model.local_blocks:
            block.compile()
    if mesh is not None and is_sharded(mesh):
        apply_fsdp(model, mesh, settings, precision)


def split_model(model: GPT, mesh: Mesh, settings: ParallelArgs, precision: Precision) -> None:
    """Apply pipeline, tensor, expert and context parallelism."""
    if mesh.dims.pipeline > 1:
        model.pipeline = Pipeline(model, mesh, settings, precision.compute or precision.storage)  # type: ignore
    vocabulary = apply_tensor_parallel(model, mesh, settings) if mesh.dims.tensor > 1 else None
    apply_expert_parallel(model, mesh, settings)
    if mesh.dims.context > 1 and settings.context_method == "ring":
        check_ring_support(model.config, precision.compute or precision.storage, mesh.storage.device_type)
    if mesh.dims.tensor * mesh.dims.context > 1:
        model.local_tokens = build_local_tokens(mesh, settings, vocabulary)  # type: ignore[assignment]


def apply_fsdp(model: GPT, mesh: Mesh, settings: ParallelArgs, precision: Precision) -> None:
    """Shard every block, and then the rest of the model, with FSDP2; experts over a mesh of their own.

    The corrections of routers stay whole on every rank, and so in float32: FSDP2 would gather them in `policy`'s type.
    """
    policy = MixedPrecisionPolicy(param_dtype=precision.compute, reduce_dtype=precision.reduce)
    options: dict[str, Any] = {"mp_policy": policy}
    if settings.cpu_offload:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=torch.cuda.is_available())
    reshard = settings.level == 3
    for block in model.local_blocks:
        if mesh.has_expert_mesh and block.experts is not None:
            apply_expert_fsdp(block.experts, mesh, reshard_after_forward=reshard, **options)
        corrections = (module.correction for module in block.modules() if isinstance(module, Router))
        exact = {correction for correction in corrections if correction is not None}
        fully_shard(block, mesh=mesh.fsdp_mesh, reshard_after_forward=reshard, ignored_params=exact, **options)
    fully_shard(model, mesh=mesh.fsdp_mesh, reshard_after_forward=False, **options)
    model.zero = settings.level  # type: ignore[assignment]
    if settings.prefetch:
        unused = [] if model.trains_predictions else model.prediction_blocks  # would be gathered, but never run
        set_prefetch([block for block in model.local_blocks if block not in unused], settings.prefetch)
    for module in _fsdp_modules(model):
        # each loss is already divided by the global count, so gradients are summed; gloo has no scaled sums
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)


def set_prefetch(blocks: Sequence[nn.Module], number: int) -> None:
    """Let each block all-gather the parameters of the next blocks, or of the previous ones in backward.

    Args:
        number: how many blocks.
    """
    sharded = [list(_fsdp_modules(block)) for block in blocks]
    for index, block in enumerate(blocks):
        assert isinstance(block, FSDPModule)
        after, before = sharded[index + 1 : index + 1 + number], sharded[max(0, index - number) : index]
        block.set_modules_to_forward_prefetch([module for modules in after for module in modules])
        block.set_modules_to_backward_prefetch([module for modules in reversed(before) for module in modules])


def is_sharded(mesh: Mesh | None) -> bool:
    """Whether `parallelize` applies FSDP2, which then also casts parameters."""
    return mesh is not None and not mesh.is_replicated_only


def apply_ddp(model: nn.Module, mesh: Mesh | None, reduce_dtype: torch.dtype | None = None) -> nn.Module:
    """Wrap a model in DistributedDataParallel if it is only replicated; return any other as it is.

    Args:
        reduce_dtype: of gradients while they are summed over ranks; None for their type.
    """
    if mesh is None or not mesh.is_replicated_only:
        return model
    group = mesh.group("data")
    wrapped = DistributedDataParallel(model, process_group=group, gradient_as_bucket_view=True)
    wrapped.register_comm_hook((group, reduce_dtype), _all_reduce_hook)
    return wrapped


def _all_reduce_hook(
    state: tuple[dist.ProcessGroup, torch.dtype | None], bucket: dist.GradBucket
) -> torch.futures.Future[torch.Tensor]:
    group, reduce_dtype = state
    gradients = bucket.buffer()
    reduced = gradients.to(reduce_dtype or gradients.dtype)
    work = dist.all_reduce(reduced, group=group, async_op=True)
    return work.get_future().then(lambda _: reduced.to(gradients.dtype))


def _fsdp_modules(model: nn.Module) -> Iterator[FSDPModule]:
    return (module for module in model.modules() if isinstance(module, FSDPModule))


def list_gathered_parameters(model: nn.Module) -> list[torch.Tensor]:
    """The tensors into which FSDP2 gathers parameters; without memory while these are sharded."""
    states = (fully_shard.state(module) for module in _fsdp_modules(model))  # type: ignore[attr-defined]
    groups = (group for state in states for group in state._fsdp_param_groups)
    return [output for group in groups for param in group.fsdp_params for output in param.all_gather_outputs]


def init_mixed_precision(model: nn.Module) -> None:
    """Let FSDP2 initialize its mixed precision now, while all parameters that will ever be trained require gradients.

    By default it does so in the first forward pass, and infers the reduction dtype from the parameters trained then.
    """
    for module in _fsdp_modules(model):
        module.unshard()
        module.reshard()


@contextmanager
def accumulate_gradients(model: nn.Module, *, is_last: bool) -> Iterator[None]:
    """The context for forward and backward of one micro-batch, which reduces gradients in the last one of a step.

    ZeRO-2 and ZeRO-3 reduce the gradients of every micro-batch, since unsharded ones would have to be kept otherwise.
    With ZeRO-1 gradients and parameters stay unsharded until the end of the step.

    Args:
        is_last: whether the micro-batch is the last one of a step.
    """
    reduces_once = getattr(unwrap_model(model), "zero", None) == 1
    _set_gradient_sync(model, is_last=is_last, sync=is_last or not reduces_once)
    with model.no_sync() if isinstance(model, DistributedDataParallel) and not is_last else nullcontext():
        yield


def _set_gradient_sync(model: nn.Module, *, is_last: bool, sync: bool) -> None:
    for module in _fsdp_modules(model):
        module.set_is_last_backward(is_last)
        module.set_reshard_after_backward(sync, recurse=False)
        module.set_requires_gradient_sync(sync, recurse=False)


def reshard_parameters(model: nn.Module) -> None:
    """Free the parameters that a forward pass without backward has all-gathered."""
    for module in _fsdp_modules(model):
        module.reshard()


@contextmanager
def accumulate_pipeline_gradients(model: nn.Module, *, sync_each: bool) -> Iterator[None]:
    """The context for forward and backward of all micro-batches of a step, in any order.

    Args:
        sync_each: all-gather parameters and reduce gradients in every micro-batch; else both stay whole until the end.
    """
    _set_gradient_sync(model, is_last=False, sync=sync_each)
    yield
    _set_gradient_sync(model, is_last=True, sync=True)
    state = fully_shard.state(model)  # type: ignore[attr-defined]
    for group in (group for module in state._state_ctx.all_states for group in module._fsdp_param_groups):
        group.post_backward()
    state._root_post_backward_final_callback()


def copy_full_tensor(parameter: torch.Tensor, value: torch.Tensor) -> None:
    """Copy a full tensor into a parameter, of which this rank may have only a shard."""
    with torch.no_grad():
        if not isinstance(parameter, DTensor):
            parameter.copy_(value)
            return
        local, layout = parameter.to_local(), (parameter.device_mesh, parameter.placements)
        _, starts = compute_local_shape_and_global_offset(parameter.shape, *layout)
        ends = map(int.__add__, starts, local.shape)
        local.copy_(value[tuple(map(slice, starts, ends))])


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The full tensor on every rank, gathered if it is a DTensor."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@contextmanager
def run_blocks_eagerly(model: GPT) -> Iterator[None]:
    """Run blocks that `parallelize` compiles without their compiled code, which would be built for each new shape."""
    compiled = [(block, block._compiled_call_impl) for block in model.local_blocks]
    try:
        for block, _ in compiled:
            block._compiled_call_impl = None
        yield
    finally:
        for block, call in compiled:
            block._compiled_call_impl = call


def unwrap_model(model: Any) -> nn.Module:
    """The model without its DistributedDataParallel wrapper, if it has one."""
    return model.module if isinstance(model, DistributedDataParallel) else model
