"""Collectives with autograd support, and those without gradient that they are made of.

function                 forward           backward
all_gather               all-gather        reduce-scatter
reduce_scatter           reduce-scatter    all-gather
copy_to_group            identity          all-reduce
all_reduce               all-reduce        identity
all_gather_replicated    all-gather        this rank's chunk
all_to_all               all-to-all        all-to-all
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


def all_gather_no_grad(x: Tensor, group: ProcessGroup, dim: int) -> Tensor:
    """The tensors of all ranks, of equal shapes, concatenated along a dim; without gradient."""
    dim %= x.dim()
    chunks = x.new_empty(dist.get_world_size(group), *x.shape)
    dist.all_gather_into_tensor(chunks.flatten(0, 1), x.contiguous(), group=group)  # gloo needs concatenated outputs
    return chunks.movedim(0, dim).flatten(dim, dim + 1)


def reduce_scatter_no_grad(x: Tensor, group: ProcessGroup, dim: int) -> Tensor:
    """This rank's chunk along a dim of the sum of all ranks' tensors; without gradient."""
    dim %= x.dim()
    chunks = x.unflatten(dim, (dist.get_world_size(group), -1)).movedim(dim, 0).contiguous()
    chunk = torch.empty_like(chunks[0])
    dist.reduce_scatter_tensor(chunk, chunks.flatten(0, 1), group=group)
    return chunk


def all_reduce_no_grad(x: Tensor, group: ProcessGroup, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
    """The sum, or the maximum, of all ranks' tensors; without gradient."""
    reduced = x.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(reduced, op, group=group)
    return reduced


def all_to_all_no_grad(
    rows: Tensor, group: ProcessGroup, input_splits: Sequence[int], output_splits: Sequence[int]
) -> Tensor:
    """The rows that all ranks send to this one, in the order of ranks; without gradient."""
    received = rows.new_empty(sum(output_splits), *rows.shape[1:])
    dist.all_to_all_single(received, rows.contiguous(), list(output_splits), list(input_splits), group=group)
    return received


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup, dim: int) -> Tensor:
        ctx.group, ctx.dim = group, dim
        return all_gather_no_grad(x, group, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return reduce_scatter_no_grad(grad, ctx.group, ctx.dim), None, None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup, dim: int) -> Tensor:
        ctx.group, ctx.dim = group, dim
        return reduce_scatter_no_grad(x, group, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return all_gather_no_grad(grad, ctx.group, ctx.dim), None, None


class _CopyToGroup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return all_reduce_no_grad(grad, ctx.group), None


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(_ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        return all_reduce_no_grad(x, group)

    @staticmethod
    def backward(_ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _AllGatherReplicated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup, dim: int) -> Tensor:
        ctx.group, ctx.dim = group, dim
        return all_gather_no_grad(x, group, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        chunks = grad.chunk(dist.get_world_size(ctx.group), ctx.dim)
        return chunks[dist.get_rank(ctx.group)], None, None


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, group: ProcessGroup, input_splits: list[int], output_splits: list[int]
    ) -> Tensor:
        ctx.group, ctx.input_splits, ctx.output_splits = group, input_splits, output_splits
        return all_to_all_no_grad(rows, group, input_splits, output_splits)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return all_to_all_no_grad(grad, ctx.group, ctx.output_splits, ctx.input_splits), None, None, None


def all_gather(x: Tensor, group: ProcessGroup, dim: int) -> Tensor:
    """Concatenate all ranks' tensors along a dim, if each rank then computes something different with the result."""
    return _AllGather.apply(x, group, dim)


def reduce_scatter(x: Tensor, group: ProcessGroup, dim: int) -> Tensor:
    """This rank's chunk along a dim of the sum over ranks."""
    return _ReduceScatter.apply(x, group, dim)


def copy_to_group(x: Tensor, group: ProcessGroup) -> Tensor:
    """A tensor that is equal on all ranks, each of which then computes something different with it."""
    return _CopyToGroup.apply(x, group)


def all_reduce(x: Tensor, group: ProcessGroup) -> Tensor:
    """The sum over ranks, if all of them then compute the same with it."""
    return _AllReduce.apply(x, group)


def all_gather_replicated(x: Tensor, group: ProcessGroup, dim: int) -> Tensor:
    """Concatenate all ranks' tensors along a dim, if all of them then compute the same with the result."""
    return _AllGatherReplicated.apply(x, group, dim)


def all_to_all(rows: Tensor, group: ProcessGroup, input_splits: Sequence[int], output_splits: Sequence[int]) -> Tensor:
    """Exchange rows with all ranks of a group, in the order of ranks.

    Args:
        input_splits: the number of rows to send to each rank.
        output_splits: the number of rows to receive from each rank.
    """
    return _AllToAll.apply(rows, group, list(input_splits), list(output_splits))
