"""The device mesh of a run: all ranks, arranged by the axes of parallelism."""

import logging

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from litgpt.recipe.parallel import ParallelDims


class Mesh:
    """Three device meshes over the same ranks, the slowest-varying axis first.

        storage   (pipeline, data_replicate, shard, tensor)                         layout of parameters
        batch     (pipeline, data, context, tensor)                                 layout of tokens
        experts   (pipeline, data_replicate, expert_shard, expert, expert_tensor)   layout of the experts' parameters

    where shard = data_shard x context, data = data_replicate x data_shard, and
    expert_shard x expert x expert_tensor = shard x tensor. Parameters are DTensors over submeshes of `storage` and
    `experts`. Consecutive ranks, which are the closest devices, share a layer's matrices; the most distant ones are
    pipeline stages.

    Args:
        dims: ranks along each axis.
        device: type of the devices, such as "cuda".
    """

    def __init__(self, dims: ParallelDims, device: str) -> None:
        # torch warns for every tensor that is gathered along several axes, and that gloo exchanges shards more slowly
        for module in ("_redistribute", "_collective_utils"):
            logging.getLogger(f"torch.distributed.tensor.{module}").setLevel(logging.ERROR)

        def arrange(**axes: int) -> DeviceMesh:
            return init_device_mesh(device, tuple(axes.values()), mesh_dim_names=tuple(axes))

        self.dims = dims
        stages, replicas, tensor = dims.pipeline, dims.data_replicate, dims.tensor
        self.storage = arrange(pipeline=stages, data_replicate=replicas, shard=dims.shard, tensor=tensor)
        self.batch = arrange(pipeline=stages, data=dims.data_ranks, context=dims.context, tensor=tensor)
        self.experts = self.storage
        if self.has_expert_mesh:
            self.experts = arrange(
                pipeline=stages,
                data_replicate=replicas,
                expert_shard=dims.expert_shard,
                expert=dims.expert,
                expert_tensor=dims.expert_tensor,
            )

    @property
    def has_expert_mesh(self) -> bool:
        """Whether experts have a mesh of their own: not only with expert axes, but with tensor parallelism too.

        Ranks along the tensor axis have different tokens, so they shard the experts' parameters.
        """
        return self.dims.expert * self.dims.expert_tensor * self.dims.tensor > 1

    @property
    def is_replicated_only(self) -> bool:
        """Whether every rank has the whole model, so that gradients are all that is communicated (DDP)."""
        return self.dims.world_size == self.dims.data_replicate

    @property
    def fsdp_mesh(self) -> DeviceMesh:
        """The mesh over which FSDP2 shards parameters: one axis, or two of which the first replicates (HSDP)."""
        if self.dims.data_replicate > 1:
            return self.storage["data_replicate", "shard"]
        return self.storage["shard"]

    @property
    def expert_fsdp_mesh(self) -> DeviceMesh:
        """The mesh over which FSDP2 shards the experts' parameters."""
        if self.dims.data_replicate > 1:
            return self.experts["data_replicate", "expert_shard"]
        return self.experts["expert_shard"]

    def rank(self, axis: str) -> int:
        """This rank's index along an axis of `batch`."""
        return self.batch.get_local_rank(axis)

    def group(self, axis: str) -> dist.ProcessGroup:
        """The process group of this rank along an axis of `batch`."""
        return self.batch.get_group(axis)

    @property
    def is_batch_leader(self) -> bool:
        """Whether this rank reports on its batch, which it shares with other ranks."""
        return not any(self.rank(axis) for axis in ("pipeline", "context", "tensor"))

    @property
    def is_loss_leader(self) -> bool:
        """Whether this rank reports its loss, which is equal on all ranks of the tensor axis."""
        return not self.rank("tensor")
