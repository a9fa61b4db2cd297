"""Exchanges between ranks that gradients flow through, each with its opposite.

forward                                   backward
gathered    all-gather along a dim        reduce-scatter
scattered   reduce-scatter along a dim    all-gather
copied      nothing                       all-reduce
summed      all-reduce                    nothing
collected   all-gather along a dim        own part: what follows is the same on every rank
exchanged   all-to-all of rows            all-to-all back
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Group = dist.ProcessGroup


def all_gather_no_grad(x: Tensor, group: Group, dim: int) -> Tensor:
    """Every rank's tensor, all of one shape, one after the other along a dim; no gradient."""
    dim %= x.dim()
    parts = x.new_empty(dist.get_world_size(group), *x.shape)
    dist.all_gather_into_tensor(parts.flatten(0, 1), x.contiguous(), group=group)  # gloo knows no other shape
    return parts.movedim(0, dim).flatten(dim, dim + 1)


def reduce_scatter_no_grad(x: Tensor, group: Group, dim: int) -> Tensor:
    """This rank's part along a dim of the sum of every rank's tensor; no gradient."""
    dim %= x.dim()
    parts = x.unflatten(dim, (dist.get_world_size(group), -1)).movedim(dim, 0).contiguous()
    part = torch.empty_like(parts[0])
    dist.reduce_scatter_tensor(part, parts.flatten(0, 1), group=group)
    return part


def all_reduce_no_grad(x: Tensor, group: Group, kind: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
    """The sum, or the highest, of every rank's tensor; no gradient."""
    total = x.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, kind, group=group)
    return total


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, dim: int) -> Tensor:
        ctx.group, ctx.dim = group, dim
        return all_gather_no_grad(x, group, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return reduce_scatter_no_grad(grad, ctx.group, ctx.dim), None, None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, dim: int) -> Tensor:
        ctx.group, ctx.dim = group, dim
        return reduce_scatter_no_grad(x, group, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return all_gather_no_grad(grad, ctx.group, ctx.dim), None, None


class _CopyToGroup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return all_reduce_no_grad(grad, ctx.group), None


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        return all_reduce_no_grad(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _AllGatherReplicated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, dim: int) -> Tensor:
        ctx.group, ctx.dim = group, dim
        return all_gather_no_grad(x, group, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        parts = grad.chunk(dist.get_world_size(ctx.group), ctx.dim)
        return parts[dist.get_rank(ctx.group)], None, None


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: Group, sent: list[int], received: list[int]) -> Tensor:
        ctx.group, ctx.sent, ctx.received = group, sent, received
        return all_to_all_no_grad(rows, group, sent, received)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return all_to_all_no_grad(grad, ctx.group, ctx.received, ctx.sent), None, None, None


def all_to_all_no_grad(rows: Tensor, group: Group, sent: Sequence[int], received: Sequence[int]) -> Tensor:
    """The rows that other ranks have for this one, in rank order; no gradient."""
    got = rows.new_empty(sum(received), *rows.shape[1:])
    dist.all_to_all_single(got, rows.contiguous(), list(received), list(sent), group=group)
    return got


def all_gather(x: Tensor, group: Group, dim: int) -> Tensor:
    """Every rank's part along a dim; each rank goes on to do something else with the whole."""
    return _AllGather.apply(x, group, dim)


def reduce_scatter(x: Tensor, group: Group, dim: int) -> Tensor:
    """This rank's part along a dim of the sum over ranks."""
    return _ReduceScatter.apply(x, group, dim)


def copy_to_group(x: Tensor, group: Group) -> Tensor:
    """What all ranks have alike, and each does something else with."""
    return _CopyToGroup.apply(x, group)


def all_reduce(x: Tensor, group: Group) -> Tensor:
    """The sum over ranks, with which each goes on to do the same."""
    return _AllReduce.apply(x, group)


def all_gather_replicated(x: Tensor, group: Group, dim: int) -> Tensor:
    """Every rank's part along a dim; all ranks go on to do the same with the whole."""
    return _AllGatherReplicated.apply(x, group, dim)


def all_to_all(rows: Tensor, group: Group, sent: Sequence[int], received: Sequence[int]) -> Tensor:
    """Rows for other ranks, in rank order, for the rows that they have for this one.

    Args:
        sent: how many rows go to each rank.
        received: how many come from each.
    """
    return _AllToAll.apply(rows, group, list(sent), list(received))
