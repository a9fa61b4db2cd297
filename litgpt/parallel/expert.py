"""Expert parallelism: each rank has some of the experts, and tokens are dispatched to them and combined again.

Every rank of the axes `expert` and `expert_tensor` has tokens of its own. Ranks along `expert_tensor` have shards of
the same experts, split along the inner width, so each row is sent to all of them, and their outputs are summed.

Axes: D model width, E experts, P ranks of the dispatch group, R rows of this rank's tokens, sorted by expert, S rows of
this rank's experts, sorted by expert.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from litgpt.errors import UserError
from litgpt.model.gpt import GPT
from litgpt.model.moe import Permutation, permute, unpermute
from litgpt.model.surgery import Function, wrap_forward
from litgpt.parallel import collectives
from litgpt.parallel.mesh import Mesh
from litgpt.parallel.model_sizes import check_expert_sizes
from litgpt.parallel.tensor import LocalLayout, distribute_parameter, use_local_params
from litgpt.recipe.parallel import ParallelArgs

COLUMN_PARAMS = ("", "_bias", "_lora_b", "_lora_b_first", "_lora_magnitude")
ROW_PARAMS = ("", "_lora_a", "_lora_a_first")
"""The parameters, by suffix, of a layer split along its outputs (gate, up) or its inputs (down)."""
INNER_DIM = {
    **{name + suffix: 1 for name in ("gate", "up") for suffix in COLUMN_PARAMS},
    **{"down" + suffix: 2 for suffix in ROW_PARAMS},
}
"""The dim of the inner width of each parameter, along which it is split over `expert_tensor`."""
REPLICATED_EXPERT_PARAMS = {
    *(name + suffix for name in ("gate", "up") for suffix in ROW_PARAMS[1:]),
    *("down" + suffix for suffix in ("_bias", "_lora_b", "_lora_b_first")),
}
"""Parameters without inner width, which are replicated over `expert_tensor`."""


class AllToAllDispatcher:
    """Sends each row only to the ranks that have its expert.

    Args:
        ends_E: the end of each expert's rows, for all experts, int32.
        rows: of all experts.
        group: ranks ordered by their experts; ranks with the same experts are adjacent.
        holders: the number of ranks with shards of the same expert.

    Attributes:
        ends_E: the end of the rows of each local expert, int32.
    """

    def __init__(self, ends_E: Tensor, rows: int, group: ProcessGroup, holders: int) -> None:
        self.group, self.rows, self.holders = group, rows, holders
        self.ranks = ranks = dist.get_world_size(group)
        counts_Ge = ends_E.diff(prepend=ends_E.new_zeros(1)).long().view(ranks // holders, -1)
        sent_Pe = counts_Ge.repeat_interleave(holders, dim=0)
        received_Pe = collectives.all_to_all_no_grad(sent_Pe, group, [1] * ranks, [1] * ranks)
        self.sent, self.received = self.read_splits(sent_Pe.sum(1), received_Pe.sum(1))
        experts = received_Pe.shape[1]
        numbers_Pe = torch.arange(experts, device=ends_E.device).expand_as(received_Pe)
        expert_S = numbers_Pe.flatten().repeat_interleave(received_Pe.flatten(), output_size=sum(self.received))
        self.sorted = Permutation(expert_S[:, None], experts)
        self.ends_E = self.sorted.ends_E
        self.copies = build_copies(counts_Ge.sum(1), rows, holders) if holders > 1 else None

    def read_splits(self, sent_P: Tensor, received_P: Tensor) -> tuple[list[int], list[int]]:
        """The number of rows for each rank and that of rows from each rank, on the host."""
        sent, received = torch.stack([sent_P, received_P]).tolist()
        return sent, received

    def start_dispatch(self, rows_RD: Tensor) -> Callable[[], Tensor]:
        """Send rows; the function that is returned waits for those of all ranks for the local experts, (S, D)."""
        if self.copies is not None:
            rows_RD = permute(rows_RD, self.copies)
        wait = collectives.start_all_to_all(rows_RD, self.group, self.sent, self.received)
        return lambda: permute(wait(), self.sorted)

    def combine(self, rows_SD: Tensor) -> Tensor:
        """The outputs for this rank's rows, summed over ranks, (R, D)."""
        outputs = unpermute(rows_SD, self.sorted)
        rows = collectives.all_to_all(outputs, self.group, self.received, self.sent)
        return rows if self.copies is None else unpermute(rows, self.copies)


class AllGatherDispatcher:
    """Sends all rows to all ranks, which select those of their experts.

    Arguments and attributes are those of `AllToAllDispatcher`.
    """

    def __init__(self, ends_E: Tensor, rows: int, group: ProcessGroup, holders: int) -> None:
        self.group, self.rows, self.holders = group, rows, holders
        self.ranks = ranks = dist.get_world_size(group)
        ends_PE = collectives.all_gather_no_grad(ends_E[None], group, 0)
        self.longest = self.read_longest(ends_PE[:, -1])
        experts = len(ends_E) * holders // ranks
        index_PL = torch.arange(self.longest, device=ends_E.device, dtype=ends_E.dtype).repeat(ranks, 1)
        expert = torch.searchsorted(ends_PE, index_PL, right=True).flatten()
        expert = expert - dist.get_rank(group) // holders * experts
        is_remote = (expert < 0) | (expert >= experts)
        self.sorted = Permutation(expert.masked_fill(is_remote, experts)[:, None], experts)
        self.ends_E = self.sorted.ends_E
        self.local_S = self.sorted.order_R[: self.read_local_rows()]

    def read_longest(self, rows_P: Tensor) -> int:
        """The largest number of rows of a rank, on the host."""
        return int(rows_P.max())

    def read_local_rows(self) -> int:
        """The number of rows for the local experts, on the host."""
        return int(self.ends_E[-1])

    def start_dispatch(self, rows_RD: Tensor) -> Callable[[], Tensor]:
        """A function that returns the rows of all ranks for the local experts, (S, D)."""
        padded = F.pad(rows_RD, (0, 0, 0, self.longest - self.rows))
        return lambda: collectives.all_gather(padded, self.group, 0).index_select(0, self.local_S)

    def combine(self, rows_SD: Tensor) -> Tensor:
        """The outputs for this rank's rows, summed over ranks, (R, D)."""
        outputs = rows_SD.new_zeros(self.longest * self.ranks, rows_SD.shape[1])
        return collectives.reduce_scatter(outputs.index_copy(0, self.local_S, rows_SD), self.group, 0)[: self.rows]


TokenDispatcher = AllToAllDispatcher | AllGatherDispatcher
"""Dispatches one rank's rows to the ranks of their experts, and combines their outputs."""
DISPATCHERS: dict[str, type[TokenDispatcher]] = {"all-to-all": AllToAllDispatcher, "all-gather": AllGatherDispatcher}


def build_copies(counts_G: Tensor, rows: int, holders: int) -> Permutation:
    """The order in which rows are sent if each goes to `holders` ranks: those for the first rank, and so on.

    Args:
        rows: the sum of the counts.
    """
    groups = torch.arange(len(counts_G), device=counts_G.device)
    group_R = groups.repeat_interleave(counts_G, output_size=rows)
    rank_RH = group_R[:, None] * holders + torch.arange(holders, device=counts_G.device)
    return Permutation(rank_RH, len(counts_G) * holders)


def apply_expert_parallel(model: GPT, mesh: Mesh, settings: ParallelArgs) -> None:
    """Shard the experts of every block over the axes `expert` and `expert_tensor`, and dispatch tokens to them.

    Raises:
        UserError: if the model has no experts, their number or width is not divisible, or a tuner is not supported.
    """
    dims = mesh.dims
    if dims.expert * dims.expert_tensor == 1:
        return
    check_expert_sizes(model.config, dims.expert, dims.expert_tensor)
    axes, group = build_dispatch_group(mesh)
    build_dispatcher = partial(DISPATCHERS[settings.expert_dispatch], group=group, holders=dims.expert_tensor)
    for block in model.local_blocks:
        if (experts := block.experts) is None:
            continue
        parameters = experts._parameters.items()
        layouts = {key: plan_expert_parameter(key, axes) for key, parameter in parameters if parameter is not None}
        for key, layout in layouts.items():
            distribute_parameter(experts, key, axes, layout)
        use_local_params(experts, {experts: layouts})
        wrap_forward(block.mlp, partial(dispatch_rows, build_dispatcher=build_dispatcher), "start_experts")


def build_dispatch_group(mesh: Mesh) -> tuple[DeviceMesh, ProcessGroup]:
    """The mesh of those of the two axes that have several ranks, and the process group of all its ranks.

    DTensor plans over all placements on every axis: each further axis takes ten times as long.
    """
    dims = mesh.dims
    if min(dims.expert, dims.expert_tensor) == 1:
        axis = "expert" if dims.expert > 1 else "expert_tensor"
        return mesh.experts[axis], mesh.experts.get_group(axis)
    axes = mesh.experts["expert", "expert_tensor"]
    return axes, axes._flatten("dispatch").get_group()


def plan_expert_parameter(key: str, axes: DeviceMesh) -> LocalLayout:
    """The layout of a parameter of stacked experts over those of `expert` and `expert_tensor` that `axes` has."""
    assert axes.mesh_dim_names is not None
    expert_placements = (Shard(0),) if "expert" in axes.mesh_dim_names else ()
    if "expert_tensor" not in axes.mesh_dim_names:
        return LocalLayout(expert_placements)
    key = key.removesuffix("_trained")
    if dim := INNER_DIM.get(key):
        return LocalLayout((*expert_placements, Shard(dim)))
    if key not in REPLICATED_EXPERT_PARAMS:
        raise UserError(
            f"tuner: experts.{key} is not supported with parallel.expert_tensor; set parallel.expert_tensor: 1"
        )
    is_masked = key == "down_bias" and axes.get_local_rank("expert_tensor") > 0
    return LocalLayout(
        (*expert_placements, Replicate()),
        (*expert_placements, Partial()),
        partial(torch.mul, other=0) if is_masked else None,
    )


def dispatch_rows(start_experts: Function, build_dispatcher: Callable[[Tensor, int], TokenDispatcher]) -> Function:
    """Wrap `MoE.start_experts` of a rank's experts: rows are dispatched to it, and its outputs combined.

    The block computes its shared experts while rows are under way.

    Args:
        start_experts: of the local experts.
        build_dispatcher: builds a dispatcher from the end of each expert's rows, (E,), and the number of all rows.
    """

    def start_dispatch(x_RD: Tensor, ends_E: Tensor, weights_R: Tensor | None = None) -> Callable[[], Tensor]:
        dispatcher = build_dispatcher(ends_E, len(x_RD))
        waits = [dispatcher.start_dispatch(rows) for rows in (x_RD, weights_R) if rows is not None]

        def compute_experts() -> Tensor:
            x_SD, *weights_S = (wait() for wait in waits)
            return dispatcher.combine(start_experts(x_SD, dispatcher.ends_E, *weights_S)())

        return compute_experts

    return start_dispatch


def apply_expert_fsdp(experts: nn.Module, mesh: Mesh, **options: Any) -> None:
    """Shard experts with FSDP2 over the ranks that have the same experts: along experts, or along rows if they are few.

    Args:
        options: of `fully_shard`.
    """
    ranks = mesh.dims.expert_shard

    def choose_dim(parameter: nn.Parameter) -> Shard:
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        return Shard(int(local.shape[0] < ranks and local.shape[1] % ranks == 0))

    fully_shard(experts, mesh=mesh.expert_fsdp_mesh, shard_placement_fn=choose_dim, **options)
