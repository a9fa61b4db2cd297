"""The settings of parallelism."""

from dataclasses import dataclass, fields
from math import prod
from typing import Annotated, Literal

from annotated_types import Ge, Le

from litgpt.errors import UserError
from litgpt.recipe.bounds import Count, ZeroStage, check_numbers
from litgpt.recipe.effect import check_effects

Prefetch = Annotated[int, Ge(0), Le(64)]
AXIS_OF = {
    "sequence": "tensor",
    "context_method": "context",
    "pipeline_schedule": "pipeline",
    "pipeline_layers": "pipeline",
    "expert_dispatch": "expert",
}
"""Settings of an axis, by the name of its degree."""
Minutes = Annotated[float, Ge(0.05), Le(1e5)]


@dataclass(frozen=True)
class ParallelDims:
    """The number of ranks along each axis of the device mesh.

    Experts reuse the ranks of data_shard, context and tensor, which are arranged as expert_shard x expert x
    expert_tensor for them.
    """

    pipeline: int = 1
    data_replicate: int = 1
    data_shard: int = 1
    context: int = 1
    tensor: int = 1
    expert: int = 1
    expert_tensor: int = 1

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self.pipeline * self.data_replicate * self.ranks_per_replica

    @property
    def ranks_per_replica(self) -> int:
        """Number of ranks of one replica of one pipeline stage."""
        return self.data_shard * self.context * self.tensor

    @property
    def data_ranks(self) -> int:
        """Number of groups of ranks with different data."""
        return self.data_replicate * self.data_shard

    @property
    def shard(self) -> int:
        """Number of ranks that parameters other than those of experts are sharded over."""
        return self.data_shard * self.context

    @property
    def expert_shard(self) -> int:
        """Number of ranks that the parameters of one expert are sharded over."""
        return self.ranks_per_replica // (self.expert * self.expert_tensor)


@dataclass(frozen=True)
class ParallelArgs:
    """The parallel degrees; the product of all but expert and expert_tensor is devices x num_nodes."""

    data_replicate: Count = 1
    """Number of replicas of the model (DDP; with data_shard: HSDP)."""
    data_shard: Count | Literal["auto"] = "auto"
    """Number of devices that the parameters of a replica are sharded over (FSDP2); auto for all remaining devices."""
    reshard_after_forward: bool | Literal["auto"] = "auto"
    """Whether to reshard parameters between forward and backward: true is ZeRO-3, false is ZeRO-2."""
    zero: ZeroStage | None = None
    """ZeRO stage (Rajbhandari et al. 2020): shard optimizer states (1), gradients too (2), parameters too (3, default).

    With 1, parameters are gathered and gradients reduced once per step, not per micro-batch. In a pipeline, the default
    is 1, and 2 is not supported.
    """
    cpu_offload: bool = False
    """Keep parameters, gradients and moments in host memory, and run the optimizer there."""
    reduce_dtype: Literal["fp32", "bf16"] | None = None
    """Data type of gradients while they are summed over data ranks; null for fp32, or fp64 with precision: 64-true."""
    prefetch: Prefetch = 0
    """Number of layers whose parameters are prefetched; 0 for FSDP2's default, which is one."""
    tensor: Count = 1
    """Tensor parallelism: number of devices that every matrix is split over, preferably within a node."""
    sequence: bool = True
    """Sequence parallelism: shard the activations between tensor-parallel layers over the tensor axis."""
    context: Count = 1
    """Context parallelism: number of devices that the tokens of every sample are split over, for long samples."""
    context_method: Literal["all-gather", "ulysses", "ring"] = "all-gather"
    """Communication in attention: all-gather of keys and values, ring (causal only, no other masks), or ulysses."""
    pipeline: Count = 1
    """Pipeline parallelism: number of devices that the layers are split over."""
    pipeline_schedule: Literal["1f1b", "gpipe", "interleaved", "zbv"] = "1f1b"
    """Pipeline schedule; interleaved and zbv have two stages per device."""
    pipeline_layers: Literal["auto"] | list[Count | None] = "auto"
    """Number of layers of each stage; null, as in [11, null, 13], for an equal share of the rest; auto balances layers,
    embedding and head."""
    expert: Count = 1
    """Expert parallelism: number of devices, out of data_shard x context x tensor, that experts are split over."""
    expert_tensor: Count = 1
    """Number of devices, out of the same, that the matrices of each expert are split over."""
    expert_dispatch: Literal["all-to-all", "all-gather"] = "all-to-all"
    """Communication of tokens to experts."""

    timeout_minutes: Minutes = 30.0
    """Timeout of collectives, in minutes; a process that has died is detected within a minute. After a step that takes
    longer, also in a single process, the Python stacks of all processes are in out_dir/stacks."""

    def __post_init__(self) -> None:
        check_numbers(self, "parallel.")
        for name, axis in AXIS_OF.items():
            other, cure = f"parallel.{axis}: 1", f"set parallel.{axis}: 2 or more"
            check_effects(self, "parallel.", name, have_effect=getattr(self, axis) > 1, other=other, cure=cure)
        self._check_zero()
        if isinstance(self.pipeline_layers, list) and len(self.pipeline_layers) % self.pipeline:
            raise UserError(
                f"parallel.pipeline_layers: {len(self.pipeline_layers)} stages are not divisible by {self.pipeline} "
                f"devices (parallel.pipeline); use {self.pipeline} numbers"
            )

    def _check_zero(self) -> None:
        reshard, key = self.reshard_after_forward, f"parallel.zero: {self.zero}"
        if self.zero and reshard != "auto" and reshard != (self.zero == 3):
            raise UserError(f"{key} contradicts reshard_after_forward: {str(reshard).lower()}; remove one of them")
        if self.zero == 2 and self.pipeline > 1:
            raise UserError(f"{key} is not supported with parallel.pipeline: {self.pipeline}; set 1 or 3")
        if self.level == 3 and self.pipeline > 1 and self.pipeline_schedule == "zbv":
            key = key if self.zero else "parallel.reshard_after_forward: true"
            raise UserError(
                f"{key} is not supported with parallel.pipeline_schedule: zbv; set parallel.zero: 1, or "
                "parallel.pipeline_schedule: 1f1b"
            )

    @property
    def level(self) -> int:
        """The ZeRO stage."""
        levels = {True: 3, False: 1, "auto": 1} if self.pipeline > 1 else {True: 3, False: 2, "auto": 3}
        return self.zero or levels[self.reshard_after_forward]

    def resolve_dims(self, world_size: int, *, num_nodes: int = 1) -> ParallelDims:
        """Return the parallel degrees for `world_size` = devices x num_nodes processes.

        Raises:
            UserError: if their product is not `world_size`, or expert x expert_tensor does not divide a replica.
        """
        others = {name: getattr(self, name) for name in ("pipeline", "data_replicate", "context", "tensor")}
        others = {name: degree for name, degree in others.items() if degree > 1}
        used = prod(others.values())
        if self.data_shard == "auto":
            shard, rest = divmod(world_size, used)
            if rest:
                raise UserError(
                    f"{format_product(others)} does not divide devices x num_nodes = {world_size}; "
                    f"set {find_cure(others, world_size, num_nodes)}"
                )
        else:
            shard = self.data_shard
            if used * shard != world_size:
                product = format_product(others | {"data_shard": shard})
                raise UserError(
                    f"{product}, but devices x num_nodes is {world_size}; set parallel.data_shard: auto, or "
                    f"{format_devices(used * shard, num_nodes)}"
                )
        degrees = {field.name: getattr(self, field.name) for field in fields(ParallelDims)}
        dims = ParallelDims(**degrees | {"data_shard": shard})
        if dims.data_replicate == dims.world_size and (self.cpu_offload or (self.zero and world_size > 1)):
            setting = "cpu_offload: true" if self.cpu_offload else f"zero: {self.zero}"
            off = "cpu_offload: false" if self.cpu_offload else "zero: null"
            raise UserError(
                f"parallel.{setting} needs devices to shard over, but each has the whole model; "
                + ("set parallel.data_replicate: 1" if world_size > 1 else f"set parallel.{off}, or devices: 2")
            )
        if dims.ranks_per_replica % (self.expert * self.expert_tensor):
            raise UserError(
                f"parallel.expert x expert_tensor: {self.expert} x {self.expert_tensor} does not divide data_shard x "
                f"context x tensor = {shard} x {self.context} x {self.tensor} = {dims.ranks_per_replica}; "
                f"set parallel.expert: {dims.ranks_per_replica // self.expert_tensor or 1}"
            )
        return dims


def format_product(degrees: dict[str, int]) -> str:
    """Format the product of parallel degrees with their keys, such as `parallel.pipeline x tensor: 2 x 4 = 8`."""
    numbers, product = " x ".join(map(str, degrees.values())), prod(degrees.values())
    return f"parallel.{' x '.join(degrees)}: {numbers}" + (f" = {product}" if len(degrees) > 1 else "")


def find_cure(degrees: dict[str, int], world_size: int, num_nodes: int) -> str:
    """Return the settings with which the product of parallel degrees divides the number of processes."""
    used = prod(degrees.values())
    devices = format_devices(used, num_nodes)
    for name, degree in reversed(degrees.items()):
        if world_size % (used // degree) == 0:
            largest = max(number for number in range(1, degree) if world_size // (used // degree) % number == 0)
            return f"parallel.{name}: {largest}, or {devices}"
    return devices


def format_devices(processes: int, num_nodes: int) -> str:
    """Format the setting of `devices`, which are those of each node, for a number of processes on all nodes."""
    devices, rest = divmod(processes, num_nodes)
    return f"num_nodes: 1 and devices: {processes}" if rest else f"devices: {devices}"
