"""Expert parallelism: experts are dealt out over ranks, and tokens travel to theirs and back.

Every rank of the axes `expert` and `expert_tensor` has tokens of its own. Neighbours along `expert_tensor` hold parts
of the inner width of the same experts, so each row goes to all of them, and what comes back is added up.

Axes: D model width, E experts, P ranks that rows travel between, R rows of this rank's tokens, sorted by expert, S rows
of this rank's experts, sorted by expert.
"""

from collections.abc import Callable
from functools import partial
from math import gcd
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from litgpt.errors import UserError
from litgpt.model.config import Config
from litgpt.model.moe import Permutation, permute, unpermute
from litgpt.model.surgery import Function, wrap_forward
from litgpt.parallel.collectives import (
    Group,
    all_gather,
    all_gather_no_grad,
    all_to_all,
    all_to_all_no_grad,
    reduce_scatter,
)
from litgpt.parallel.mesh import Mesh
from litgpt.parallel.tensor import LocalLayout, distribute_parameter, use_local_params
from litgpt.recipe.parallel import ParallelArgs

OUTWARD, INWARD = ("", "_bias", "_lora_b", "_lora_b_first", "_lora_magnitude"), ("", "_lora_a", "_lora_a_first")
INNER_DIM = {
    **{name + part: 1 for name in ("gate", "up") for part in OUTWARD},
    **{"down" + part: 2 for part in INWARD},
}
"""The dim of the inner width, along which a parameter is split over `expert_tensor`."""
REPLICATED_EXPERT_PARAMS = {
    *(name + part for name in ("gate", "up") for part in INWARD[1:]),
    *("down" + part for part in ("_bias", "_lora_b", "_lora_b_first")),
}
"""Parameters without it, which all ranks of `expert_tensor` have."""


class TokenDispatcher(Protocol):
    """The way of one rank's rows to their experts and back.

    Attributes:
        ends_E: where the rows of each expert that lies here end, int32.
    """

    ends_E: Tensor

    def dispatch(self, rows_RD: Tensor) -> Tensor:
        """(S, D), the rows of every rank for the experts that lie here."""

    def combine(self, rows_SD: Tensor) -> Tensor:
        """(R, D), what all ranks made of this rank's rows, added up."""


class AllToAllDispatcher:
    """Each row goes to the ranks that hold its expert, and to no other.

    Args:
        ends_E: where the rows of each of all experts end.
        group: ranks in order of their experts, those of the same experts side by side.
        holders: how many ranks hold parts of the same expert.
    """

    def __init__(self, ends_E: Tensor, group: Group, holders: int) -> None:
        self.group, ranks = group, dist.get_world_size(group)
        counts_Ge = count_rows(ends_E).view(ranks // holders, -1)
        sent_Pe = counts_Ge.repeat_interleave(holders, dim=0)
        received_Pe = all_to_all_no_grad(sent_Pe, group, [1] * ranks, [1] * ranks)
        self.sent, self.received = torch.stack([sent_Pe.sum(1), received_Pe.sum(1)]).tolist()
        experts = received_Pe.shape[1]
        numbers_Pe = torch.arange(experts, device=ends_E.device).expand_as(received_Pe)
        arrived_S = numbers_Pe.flatten().repeat_interleave(received_Pe.flatten(), output_size=sum(self.received))
        self.sorted = Permutation(arrived_S[:, None], experts)
        self.ends_E = self.sorted.ends_E
        self.copies = build_copies(counts_Ge.sum(1), holders) if holders > 1 else None

    def dispatch(self, rows_RD: Tensor) -> Tensor:
        """(S, D), the rows of every rank for the experts that lie here."""
        if self.copies is not None:
            rows_RD = permute(rows_RD, self.copies)
        arrived = all_to_all(rows_RD, self.group, self.sent, self.received)
        return permute(arrived, self.sorted)

    def combine(self, rows_SD: Tensor) -> Tensor:
        """(R, D), what all ranks made of this rank's rows, added up."""
        arrived = unpermute(rows_SD, self.sorted)
        rows = all_to_all(arrived, self.group, self.received, self.sent)
        return rows if self.copies is None else unpermute(rows, self.copies)


class AllGatherDispatcher:
    """All rows go to all ranks, each of which picks those of its experts; the arguments are those of `AllToAll`."""

    def __init__(self, ends_E: Tensor, group: Group, holders: int) -> None:
        self.group, ranks = group, dist.get_world_size(group)
        ends_PE = all_gather_no_grad(ends_E[None], group, 0)
        self.rows, self.longest = torch.stack([ends_E[-1], ends_PE[:, -1].max()]).tolist()
        experts = len(ends_E) * holders // ranks
        place_PL = torch.arange(self.longest, device=ends_E.device, dtype=ends_E.dtype).repeat(ranks, 1)
        owner = torch.searchsorted(ends_PE, place_PL, right=True).flatten()
        owner = owner - dist.get_rank(group) // holders * experts
        elsewhere = (owner < 0) | (owner >= experts)
        self.sorted = Permutation(owner.masked_fill(elsewhere, experts)[:, None], experts)
        self.ends_E = self.sorted.ends_E
        self.mine_S = self.sorted.order_R[: int(self.ends_E[-1])]

    def dispatch(self, rows_RD: Tensor) -> Tensor:
        """(S, D), the rows of every rank for the experts that lie here."""
        padded = F.pad(rows_RD, (0, 0, 0, self.longest - self.rows))
        return all_gather(padded, self.group, 0).index_select(0, self.mine_S)

    def combine(self, rows_SD: Tensor) -> Tensor:
        """(R, D), what all ranks made of this rank's rows, added up."""
        everywhere = rows_SD.new_zeros(self.longest * dist.get_world_size(self.group), rows_SD.shape[1])
        return reduce_scatter(everywhere.index_copy(0, self.mine_S, rows_SD), self.group, 0)[: self.rows]


DISPATCHERS: dict[str, Callable[..., TokenDispatcher]] = {
    "all-to-all": AllToAllDispatcher,
    "all-gather": AllGatherDispatcher,
}


def count_rows(ends_E: Tensor) -> Tensor:
    """The number of rows of each expert, int64."""
    return ends_E.diff(prepend=ends_E.new_zeros(1)).long()


def build_copies(counts_G: Tensor, holders: int) -> Permutation:
    """The order in which rows leave if `holders` neighbours get each of them: first for the first, and so on."""
    group_R = torch.arange(len(counts_G), device=counts_G.device).repeat_interleave(counts_G)
    rank_RH = group_R[:, None] * holders + torch.arange(holders, device=counts_G.device)
    return Permutation(rank_RH, len(counts_G) * holders)


def apply_expert_parallel(model: nn.Module, config: Config, mesh: Mesh, settings: ParallelArgs) -> None:
    """Split the experts of every block over the axes `expert` and `expert_tensor`, and let rows travel.

    Raises:
        UserError: if there are no experts, their number or width does not go round, or a tuner has no split.
    """
    dims = mesh.dims
    if dims.expert * dims.expert_tensor == 1:
        return
    check_expert_sizes(config, dims.expert, dims.expert_tensor)
    axes, group = expert_axes(mesh)
    build_dispatcher = partial(DISPATCHERS[settings.expert_dispatch], group=group, holders=dims.expert_tensor)
    for experts in find_experts(model):
        keys = [key for key, parameter in experts._parameters.items() if parameter is not None]
        layouts = {key: plan_expert_parameter(key, axes) for key in keys}
        for key, layout in layouts.items():
            distribute_parameter(experts, key, axes, layout)
        use_local_params(experts, {experts: layouts})
        wrap_forward(experts, partial(dispatch_rows, build_dispatcher=build_dispatcher))


def expert_axes(mesh: Mesh) -> tuple[DeviceMesh, Group]:
    """Those of the two axes that have several ranks, and the group of all their ranks.

    torch tries placements for every axis of a DTensor, so that each axis more costs ten times as long.
    """
    dims = mesh.dims
    if min(dims.expert, dims.expert_tensor) == 1:
        axis = "expert" if dims.expert > 1 else "expert_tensor"
        return mesh.experts[axis], mesh.experts.get_group(axis)
    axes = mesh.experts["expert", "expert_tensor"]
    return axes, axes._flatten("dispatch").get_group()


def find_experts(model: nn.Module) -> list[nn.Module]:
    """The stacked experts of every block that has any."""
    return [block.experts for block in model.local_blocks if block.experts is not None]  # type: ignore[union-attr]


def check_expert_sizes(config: Config, expert: int, expert_tensor: int) -> None:
    """Refuse numbers of ranks that do not divide experts or their inner width."""
    sizes = {"expert": (expert, "n_expert", config.n_expert)}
    if config.n_expert:
        sizes["expert_tensor"] = (expert_tensor, "width of experts", config.expert_size)
    for axis, (ranks, name, size) in sizes.items():
        if ranks > 1 and (not size or size % ranks):
            would_do = gcd(size, ranks) if size else 1
            raise UserError(f"parallel.{axis}: {ranks} does not divide the model's {name}: {size}; set {would_do}")


def plan_expert_parameter(key: str, axes: DeviceMesh) -> LocalLayout:
    """How a parameter of stacked experts lies along those of `expert` and `expert_tensor` that there are."""
    assert axes.mesh_dim_names is not None
    dealt = (Shard(0),) if "expert" in axes.mesh_dim_names else ()
    if "expert_tensor" not in axes.mesh_dim_names:
        return LocalLayout(dealt)
    key = key.removesuffix("_trained")
    if dim := INNER_DIM.get(key):
        return LocalLayout((*dealt, Shard(dim)))
    if key not in REPLICATED_EXPERT_PARAMS:
        raise UserError(f"tuner: experts.{key} has no split for parallel.expert_tensor; set parallel.expert_tensor: 1")
    once = key == "down_bias" and axes.get_local_rank("expert_tensor") > 0
    return LocalLayout((*dealt, Replicate()), (*dealt, Partial()), partial(torch.mul, other=0) if once else None)


def dispatch_rows(forward: Function, build_dispatcher: Callable[[Tensor], TokenDispatcher]) -> Function:
    """The forward of a rank's experts for the rows of all ranks: these are dispatched to it, and its results combined.

    Args:
        forward: of the experts of this rank.
        build_dispatcher: given where the rows of each of all experts end, (E,).
    """

    def dispatched(x_RD: Tensor, ends_E: Tensor, weights_R: Tensor | None = None) -> Tensor:
        dispatcher = build_dispatcher(ends_E)
        weights_S = None if weights_R is None else dispatcher.dispatch(weights_R)
        return dispatcher.combine(forward(dispatcher.dispatch(x_RD), dispatcher.ends_E, weights_S))

    return dispatched


def apply_expert_fsdp(experts: nn.Module, mesh: Mesh, **how: Any) -> None:
    """Shard experts over the ranks that hold the same of them: experts, or rows of each where experts are too few.

    Args:
        how: as for `fully_shard`.
    """
    ranks = mesh.dims.expert_shard

    def placement(parameter: nn.Parameter) -> Shard:
        here = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        return Shard(int(here.shape[0] < ranks and here.shape[1] % ranks == 0))

    fully_shard(experts, mesh=mesh.expert_fsdp_mesh, shard_placement_fn=placement, **how)
