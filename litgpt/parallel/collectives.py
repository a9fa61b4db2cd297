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


def gather(x: Tensor, group: Group, dim: int) -> Tensor:
    """Every rank's tensor, all of one shape, one after the other along a dim; no gradient."""
    dim %= x.dim()
    parts = x.new_empty(dist.get_world_size(group), *x.shape)
    dist.all_gather_into_tensor(parts.flatten(0, 1), x.contiguous(), group=group)  # gloo knows no other shape
    return parts.movedim(0, dim).flatten(dim, dim + 1)


def scatter(x: Tensor, group: Group, dim: int) -> Tensor:
    """This rank's part along a dim of the sum of every rank's tensor; no gradient."""
    dim %= x.dim()
    parts = x.unflatten(dim, (dist.get_world_size(group), -1)).movedim(dim, 0).contiguous()
    part = torch.empty_like(parts[0])
    dist.reduce_scatter_tensor(part, parts.flatten(0, 1), group=group)
    return part


def reduce(x: Tensor, group: Group, kind: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
    """The sum, or the highest, of every rank's tensor; no gradient."""
    total = x.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, kind, group=group)
    return total


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, dim: int) -> Tensor:
        ctx.group, ctx.dim = group, dim
        return gather(x, group, dim)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None, None]:
        return scatter(slope, ctx.group, ctx.dim), None, None


class _Scattered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, dim: int) -> Tensor:
        ctx.group, ctx.dim = group, dim
        return scatter(x, group, dim)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None, None]:
        return gather(slope, ctx.group, ctx.dim), None, None


class _Copied(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None]:
        return reduce(slope, ctx.group), None


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        return reduce(x, group)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None]:
        return slope, None


class _Collected(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, dim: int) -> Tensor:
        ctx.group, ctx.dim = group, dim
        return gather(x, group, dim)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None, None]:
        parts = slope.chunk(dist.get_world_size(ctx.group), ctx.dim)
        return parts[dist.get_rank(ctx.group)], None, None


class _Exchanged(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: Group, sent: list[int], received: list[int]) -> Tensor:
        ctx.group, ctx.sent, ctx.received = group, sent, received
        return exchange(rows, group, sent, received)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None, None, None]:
        return exchange(slope, ctx.group, ctx.received, ctx.sent), None, None, None


def exchange(rows: Tensor, group: Group, sent: Sequence[int], received: Sequence[int]) -> Tensor:
    """The rows that other ranks have for this one, in rank order; no gradient."""
    got = rows.new_empty(sum(received), *rows.shape[1:])
    dist.all_to_all_single(got, rows.contiguous(), list(received), list(sent), group=group)
    return got


def gathered(x: Tensor, group: Group, dim: int) -> Tensor:
    """Every rank's part along a dim; each rank goes on to do something else with the whole."""
    return _Gathered.apply(x, group, dim)


def scattered(x: Tensor, group: Group, dim: int) -> Tensor:
    """This rank's part along a dim of the sum over ranks."""
    return _Scattered.apply(x, group, dim)


def copied(x: Tensor, group: Group) -> Tensor:
    """What all ranks have alike, and each does something else with."""
    return _Copied.apply(x, group)


def summed(x: Tensor, group: Group) -> Tensor:
    """The sum over ranks, with which each goes on to do the same."""
    return _Summed.apply(x, group)


def collected(x: Tensor, group: Group, dim: int) -> Tensor:
    """Every rank's part along a dim; all ranks go on to do the same with the whole."""
    return _Collected.apply(x, group, dim)


def exchanged(rows: Tensor, group: Group, sent: Sequence[int], received: Sequence[int]) -> Tensor:
    """Rows for other ranks, in rank order, for the rows that they have for this one.

    Args:
        sent: how many rows go to each rank.
        received: how many come from each.
    """
    return _Exchanged.apply(rows, group, list(sent), list(received))
