"""Collectives with autograd support, and those without gradient that they are made of.

function                 forward           backward
all_gather               all-gather        reduce-scatter
reduce_scatter           reduce-scatter    all-gather
copy_to_group            identity          all-reduce
all_reduce               all-reduce        identity
all_gather_replicated    all-gather        this rank's chunk
all_to_all               all-to-all        all-to-all
start_all_to_all         all-to-all        all-to-all
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from litgpt.model.surgery import Function
from litgpt.model.uncompiled import uncompiled


def all_gather_no_grad(x: Tensor, group: ProcessGroup, dim: int) -> Tensor:
    """The tensors of all ranks, of equal shapes, concatenated along a dim; without gradient."""
    dim %= x.dim()
    chunks = x.new_empty(dist.get_world_size(group), *x.shape)
    dist.all_gather_single(chunks.flatten(0, 1), x.contiguous(), group=group)  # gloo needs concatenated outputs
    return chunks.movedim(0, dim).flatten(dim, dim + 1)


def reduce_scatter_no_grad(x: Tensor, group: ProcessGroup, dim: int) -> Tensor:
    """This rank's chunk along a dim of the sum of all ranks' tensors; without gradient."""
    dim %= x.dim()
    chunks = x.unflatten(dim, (dist.get_world_size(group), -1)).movedim(dim, 0).contiguous()
    chunk = torch.empty_like(chunks[0])
    dist.reduce_scatter_single(chunk, chunks.flatten(0, 1), group=group)
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


def start_all_to_all_no_grad(
    rows: Tensor, group: ProcessGroup, input_splits: Sequence[int], output_splits: Sequence[int]
) -> Callable[[], Tensor]:
    """Start `all_to_all_no_grad`; the function that is returned waits for the rows."""
    received = rows.new_empty(sum(output_splits), *rows.shape[1:])
    splits = list(output_splits), list(input_splits)
    work = dist.all_to_all_single(received, rows.contiguous(), *splits, group=group, async_op=True)
    assert work is not None  # for a rank of the group

    def wait() -> Tensor:
        work.wait()
        return received

    return wait


def slice_local(x: Tensor, group: ProcessGroup, dim: int) -> Tensor:
    """This rank's chunk of a tensor along a dim."""
    return x.chunk(dist.get_world_size(group), dim)[dist.get_rank(group)]


class _Collective(torch.autograd.Function):
    """A function of a tensor and `args`; `backward` computes the gradient, of the output's gradient and `args`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: Function, backward: Function, *args: Any) -> Tensor:
        ctx.compute_grad, ctx.args = backward, args
        return forward(x, *args)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.compute_grad(grad, *ctx.args), None, None, *(None for _ in ctx.args)


def all_gather(x: Tensor, group: ProcessGroup, dim: int) -> Tensor:
    """Concatenate all ranks' tensors along a dim, if each rank then computes something different with the result."""
    return _Collective.apply(x, all_gather_no_grad, reduce_scatter_no_grad, group, dim)


def reduce_scatter(x: Tensor, group: ProcessGroup, dim: int) -> Tensor:
    """This rank's chunk along a dim of the sum over ranks."""
    return _Collective.apply(x, reduce_scatter_no_grad, all_gather_no_grad, group, dim)


def copy_to_group(x: Tensor, group: ProcessGroup) -> Tensor:
    """A tensor that is equal on all ranks, each of which then computes something different with it."""
    return _Collective.apply(x, _copy, all_reduce_no_grad, group)


def all_reduce(x: Tensor, group: ProcessGroup) -> Tensor:
    """The sum over ranks, if all of them then compute the same with it."""
    return _Collective.apply(x, all_reduce_no_grad, _copy, group)


def all_gather_replicated(x: Tensor, group: ProcessGroup, dim: int) -> Tensor:
    """Concatenate all ranks' tensors along a dim, if all of them then compute the same with the result."""
    return _Collective.apply(x, all_gather_no_grad, slice_local, group, dim)


def all_to_all(rows: Tensor, group: ProcessGroup, input_splits: Sequence[int], output_splits: Sequence[int]) -> Tensor:
    """Exchange rows with all ranks of a group, in the order of ranks.

    Args:
        input_splits: the number of rows to send to each rank.
        output_splits: the number of rows to receive from each rank.
    """
    return _Collective.apply(rows, all_to_all_no_grad, _return_rows, group, list(input_splits), list(output_splits))


@uncompiled  # an exchange under way is not a tensor
def start_all_to_all(
    rows: Tensor, group: ProcessGroup, input_splits: Sequence[int], output_splits: Sequence[int]
) -> Callable[[], Tensor]:
    """Start `all_to_all`; the function that is returned waits for the rows.

    What is computed before that function is called overlaps with the exchange. So does its backward with the exchange
    of gradients, since autograd runs the functions that are ready in the reverse order of forward.
    """
    waits: list[Callable[[], Tensor]] = []
    settings = (waits, group, list(input_splits), list(output_splits))
    received = _StartAllToAll.apply(rows, *settings)
    return uncompiled(partial(_FinishAllToAll.apply, received, *settings))


class _StartAllToAll(torch.autograd.Function):
    """Starts an exchange of rows; waits for the exchange of gradients. `waits` has the one that is under way."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, waits: list[Any], *settings: Any) -> Tensor:
        ctx.waits = waits
        waits.append(start_all_to_all_no_grad(rows, *settings))
        return rows.new_empty(())

    @staticmethod
    def backward(ctx: Any, _grad: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.waits.pop()(), None, None, None, None


class _FinishAllToAll(torch.autograd.Function):
    """Waits for an exchange of rows; starts the exchange of gradients.

    Its input is a scalar of `_StartAllToAll` that only connects the two, since rows that are sent back have the shape
    of neither.
    """

    @staticmethod
    def forward(ctx: Any, _started: Tensor, waits: list[Any], *settings: Any) -> Tensor:
        ctx.waits, ctx.settings = waits, settings
        return waits.pop()()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        group, input_splits, output_splits = ctx.settings
        ctx.waits.append(start_all_to_all_no_grad(grad, group, output_splits, input_splits))
        return grad.new_zeros(()), None, None, None, None


def _copy(x: Tensor, _group: ProcessGroup) -> Tensor:
    return x.view_as(x)


def _return_rows(rows: Tensor, group: ProcessGroup, input_splits: list[int], output_splits: list[int]) -> Tensor:
    return all_to_all_no_grad(rows, group, output_splits, input_splits)
