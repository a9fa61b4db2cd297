"""Read what a collective sends from the call of its operator."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_leaves

CollectiveKind = Literal["all_gather", "reduce_scatter", "all_reduce", "all_to_all", "broadcast", "send"]
COLLECTIVE_KINDS: dict[str, CollectiveKind] = {
    "_allgather_base_": "all_gather",
    "allgather_": "all_gather",
    "allgather_into_tensor_coalesced_": "all_gather",
    "all_gather_into_tensor": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_": "reduce_scatter",
    "reduce_scatter_tensor": "reduce_scatter",
    "allreduce_": "all_reduce",
    "allreduce_coalesced_": "all_reduce",
    "all_reduce": "all_reduce",
    "alltoall_base_": "all_to_all",
    "alltoall_": "all_to_all",
    "all_to_all_single": "all_to_all",
    "broadcast_": "broadcast",
    "send": "send",
}
"""By the names of operators of `c10d` and `_c10d_functional`; a receive is counted where it is sent."""


@dataclass(frozen=True)
class Collective:
    """A call of a collective.

    Attributes:
        bytes: of the whole tensor, such as the output of an all-gather or the input of a reduce-scatter.
        ranks: of the whole run that take part, in the order of the group; of a send, the sender and the receiver.
        is_async: whether the program goes on meanwhile, and waits for it later.
    """

    kind: CollectiveKind
    bytes: int
    ranks: tuple[int, ...]
    is_async: bool = False


def read_collective(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Collective | None:
    """Read a call of an operator of `c10d` or `_c10d_functional`; None if it sends nothing, as a wait or a receive."""
    name = func._schema.name.partition("::")[2]
    if (kind := COLLECTIVE_KINDS.get(name)) is None:
        return None
    named = {argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)} | kwargs
    ranks = list_ranks(named)
    if kind == "send":
        ranks = (dist.get_rank(), ranks[named["dst"]])
    tensors = [leaf for leaf in tree_leaves(list(named.values())) if isinstance(leaf, Tensor)]
    sizes = [tensor.numel() * tensor.element_size() for tensor in tensors]
    size = sum(sizes)
    if name == "all_gather_into_tensor":  # the functional operators have only inputs
        size *= len(ranks)
    elif kind in ("all_gather", "reduce_scatter", "all_to_all") and len(sizes) > 1:
        size = max(sizes[0], sum(sizes[1:]))  # one output and one input, or several of one of them
    return Collective(kind, size, ranks, is_async=bool(named.get("async_op")))


def list_ranks(arguments: dict[str, Any]) -> tuple[int, ...]:
    """The ranks of the group among the arguments of a collective."""
    for value in arguments.values():
        if isinstance(value, torch.ScriptObject) and "ProcessGroup" in str(value._type()):
            return tuple(dist.get_process_group_ranks(dist.ProcessGroup.unbox(value)))
    group = dist.distributed_c10d._resolve_process_group(arguments["group_name"])
    return tuple(dist.get_process_group_ranks(group))
