"""The processes of a run, seen along each axis along which they share work."""

import logging

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from litgpt.recipe.parallel import ParallelDims

STORAGE = ("pipeline", "data_replicate", "shard", "tensor")
BATCH = ("pipeline", "data", "context", "tensor")
EXPERT = ("pipeline", "data_replicate", "expert_shard", "expert", "expert_tensor")


class Mesh:
    """Three views of the same ranks, the slowest axis first.

        storage   (pipeline, data_replicate, shard, tensor)                         where parameters lie
        batch     (pipeline, data, context, tensor)                                 who reads which tokens
        experts   (pipeline, data_replicate, expert_shard, expert, expert_tensor)   where parameters of experts lie

    where shard = data_shard x context, data = data_replicate x data_shard, and
    expert_shard x expert x expert_tensor = shard x tensor. Parameters are kept as DTensors over parts of `storage` and
    `experts`. So neighbours in rank, which are the nearest devices, share a layer's matrices; the farthest are stages.
    """

    def __init__(self, dims: ParallelDims, device: str) -> None:
        # a whole tensor is put together along one axis after the other, of which torch warns at every tensor
        logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
        self.dims = dims
        self.storage = init_device_mesh(
            device, (dims.pipeline, dims.data_replicate, dims.shard, dims.tensor), mesh_dim_names=STORAGE
        )
        self.batch = init_device_mesh(
            device, (dims.pipeline, dims.data_ranks, dims.context, dims.tensor), mesh_dim_names=BATCH
        )
        self.experts = self.storage
        if self.has_expert_mesh:
            shape = (dims.pipeline, dims.data_replicate, dims.expert_shard, dims.expert, dims.expert_tensor)
            self.experts = init_device_mesh(device, shape, mesh_dim_names=EXPERT)

    @property
    def has_expert_mesh(self) -> bool:
        """Whether experts lie otherwise than the rest: tokens of all tensor ranks differ, so theirs are shards too."""
        return self.dims.expert * self.dims.expert_tensor * self.dims.tensor > 1

    @property
    def is_replicated_only(self) -> bool:
        """Whether every rank has all parameters and a whole model, so that only gradients have to be summed."""
        return self.dims.world == self.dims.data_replicate

    @property
    def fsdp_mesh(self) -> DeviceMesh:
        """What FSDP2 shards parameters over: one axis, or two whose first replicates."""
        if self.dims.data_replicate > 1:
            return self.storage["data_replicate", "shard"]
        return self.storage["shard"]

    @property
    def expert_fsdp_mesh(self) -> DeviceMesh:
        """What FSDP2 shards the parameters of experts over."""
        if self.dims.data_replicate > 1:
            return self.experts["data_replicate", "expert_shard"]
        return self.experts["expert_shard"]

    def rank(self, axis: str) -> int:
        """This rank's number along an axis of `batch`."""
        return self.batch.get_local_rank(axis)

    def group(self, axis: str) -> dist.ProcessGroup:
        """The ranks that differ from this one along an axis of `batch` only."""
        return self.batch.get_group(axis)

    @property
    def is_batch_leader(self) -> bool:
        """Whether this is the one rank that tells of a batch that several ranks work on."""
        return not any(self.rank(axis) for axis in ("pipeline", "context", "tensor"))

    @property
    def is_loss_leader(self) -> bool:
        """Whether the loss that this rank has is to be added: all ranks of the tensor axis have the same."""
        return not self.rank("tensor")
