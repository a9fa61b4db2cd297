"""How a run is laid out over devices."""

from dataclasses import dataclass
from math import prod
from typing import Annotated, Literal

from annotated_types import Ge, Le

from litgpt.errors import UserError
from litgpt.recipe.bounds import Count, check_numbers

Prefetch = Annotated[int, Ge(0), Le(64)]
Minutes = Annotated[float, Ge(0.05), Le(1e5)]


@dataclass(frozen=True)
class ParallelDims:
    """Ranks along each axis, for a number of processes that is known.

    Experts borrow the ranks of data_shard, context and tensor: there the same processes are expert_shard x expert x
    expert_tensor.
    """

    pipeline: int = 1
    data_replicate: int = 1
    data_shard: int = 1
    context: int = 1
    tensor: int = 1
    expert: int = 1
    expert_tensor: int = 1

    @property
    def world(self) -> int:
        """All processes."""
        return self.pipeline * self.data_replicate * self.ranks_per_replica

    @property
    def ranks_per_replica(self) -> int:
        """The processes of one copy of one stage, which experts lay out in their own way."""
        return self.data_shard * self.context * self.tensor

    @property
    def data_ranks(self) -> int:
        """Groups of processes that read data of their own."""
        return self.data_replicate * self.data_shard

    @property
    def shard(self) -> int:
        """Processes that parameters outside of experts are sharded over."""
        return self.data_shard * self.context

    @property
    def expert_shard(self) -> int:
        """Processes that the parameters of one expert are sharded over."""
        return self.ranks_per_replica // (self.expert * self.expert_tensor)


@dataclass(frozen=True)
class ParallelArgs:
    """The degree of each axis; the product of all but expert and expert_tensor is devices x num_nodes."""

    data_replicate: Count = 1
    """Copies of the model, each on other data (DDP; with data_shard: HSDP)."""
    data_shard: Count | Literal["auto"] = "auto"
    """Devices that one copy's parameters are spread over (FSDP2); auto takes what is left."""
    reshard_after_forward: bool | Literal["auto"] = "auto"
    """Free gathered parameters between forward and backward: true is ZeRO-3, false is ZeRO-2."""
    zero: Literal[1, 2, 3] | None = None
    """Spread over data_shard: optimizer states (1), gradients too (2), parameters too (3, the same as null).

    With 1 parameters are gathered and gradients reduced once a step, however many micro-batches it has (Rajbhandari et
    al. 2020). In a pipeline null is 1, and 2 cannot be had.
    """
    cpu_offload: bool = False
    """Keep parameters, gradients and moments in host memory, and step there; the device has a few layers at a time."""
    prefetch: Prefetch = 0
    """Layers whose parameters are gathered ahead of their turn; 0 leaves it to FSDP2, which gathers one."""
    tensor: Count = 1
    """Devices that every matrix is split over (tensor parallelism); keep them within a node."""
    sequence: bool = True
    """Between split layers each device of the tensor axis holds a part of the tokens, and not all of them."""
    context: Count = 1
    """Devices that every sample's tokens are split over (context parallelism), for long samples."""
    context_method: Literal["all-gather", "ulysses", "ring"] = "all-gather"
    """What attention exchanges: keys and values, all at once (all-gather) or one rank's after another's (ring, which
    knows no masks); or tokens for heads (ulysses)."""
    pipeline: Count = 1
    """Stages of consecutive layers that the model is cut into (pipeline parallelism)."""
    pipeline_schedule: Literal["1f1b", "gpipe", "interleaved", "zbv"] = "1f1b"
    """The order in which stages work on micro-batches; interleaved and zbv give each device two stages."""
    pipeline_layers: Literal["auto"] | list[Count] = "auto"
    """Layers of each stage, in order; auto evens out layers, embedding and head."""
    expert: Count = 1
    """Devices that experts are dealt out over (expert parallelism), out of data_shard x context x tensor."""
    expert_tensor: Count = 1
    """Devices that every expert's matrices are split over, out of the same."""
    expert_dispatch: Literal["all-to-all", "all-gather"] = "all-to-all"
    """How tokens reach their experts: each only those that it has, or all of them everywhere."""

    timeout_minutes: Minutes = 30.0
    """How long a device waits for the others; for a process that is gone or shows no life, a minute at most."""

    def __post_init__(self) -> None:
        check_numbers(self, "parallel.")
        self._check_zero()
        if isinstance(self.pipeline_layers, list) and len(self.pipeline_layers) % self.pipeline:
            raise UserError(
                f"parallel.pipeline_layers: {len(self.pipeline_layers)} stages do not go round {self.pipeline} devices "
                f"(parallel.pipeline); give {self.pipeline} numbers"
            )

    def _check_zero(self) -> None:
        freed, key = self.reshard_after_forward, f"parallel.zero: {self.zero}"
        if self.zero and freed != "auto" and freed != (self.zero == 3):
            raise UserError(f"{key} contradicts reshard_after_forward: {str(freed).lower()}; leave one of them out")
        if self.zero == 2 and self.pipeline > 1:
            raise UserError(f"{key} is not for a pipeline, which reduces gradients once a step or at once; set 1 or 3")
        if self.level == 3 and self.pipeline > 1 and self.pipeline_schedule == "zbv":
            key = key if self.zero else "parallel.reshard_after_forward: true"
            raise UserError(f"{key} is not for pipeline_schedule: zbv; set zero: 1, or pipeline_schedule: 1f1b")

    @property
    def level(self) -> int:
        """The level of ZeRO that the settings stand for."""
        whole = 1 if self.pipeline > 1 else 2
        usual = whole if self.pipeline > 1 else 3
        return self.zero or {True: 3, False: whole, "auto": usual}[self.reshard_after_forward]

    def resolve_dims(self, world: int) -> ParallelDims:
        """The degrees over `world` = devices x num_nodes processes.

        Raises:
            UserError: if their product is not `world` or experts do not fit, naming what would do.
        """
        others = {
            name: getattr(self, name)
            for name in ("pipeline", "data_replicate", "context", "tensor")
            if getattr(self, name) > 1 or name == "data_replicate"
        }
        taken = prod(others.values())
        if self.data_shard == "auto":
            shard, rest = divmod(world, taken)
            if rest:
                what = " x ".join(others)
                raise UserError(
                    f"parallel.{what}: {taken} does not divide devices x num_nodes = {world}; "
                    f"set {what}: 1 or devices: {taken}"
                )
        else:
            shard = self.data_shard
            degrees = others | {"data_shard": shard}
            if (product := taken * shard) != world:
                numbers, names = " x ".join(map(str, degrees.values())), " x ".join(degrees)
                raise UserError(
                    f"parallel: {numbers} = {product} ({names}), "
                    f"but devices x num_nodes is {world}; set data_shard: auto or devices: {product}"
                )
        dims = ParallelDims(
            pipeline=self.pipeline,
            data_replicate=self.data_replicate,
            data_shard=shard,
            context=self.context,
            tensor=self.tensor,
            expert=self.expert,
            expert_tensor=self.expert_tensor,
        )
        if dims.data_replicate == dims.world and (self.cpu_offload or (self.zero and world > 1)):
            what = "cpu_offload: true" if self.cpu_offload else f"zero: {self.zero}"
            raise UserError(
                f"parallel.{what} needs devices to shard over, and here each has a whole model; "
                + ("set data_replicate: 1" if world > 1 else "set cpu_offload: false, or devices: 2")
            )
        if dims.ranks_per_replica % (self.expert * self.expert_tensor):
            raise UserError(
                f"parallel.expert x expert_tensor: {self.expert} x {self.expert_tensor} does not divide data_shard x "
                f"context x tensor = {shard} x {self.context} x {self.tensor} = {dims.ranks_per_replica}; "
                f"set parallel.expert: {dims.ranks_per_replica // self.expert_tensor or 1}"
            )
        return dims
