"""A process group without other processes: one rank of a layout, whose collectives return at once."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.nn.parallel import distributed as ddp
from torch.testing._internal.distributed.fake_pg import FakeStore

from litgpt.parallel.mesh import Mesh
from litgpt.parallel.pipeline import Pipeline
from litgpt.recipe.parallel import ParallelDims

DDP_READS: tuple[tuple[Any, str, bool | None], ...] = (
    (ddp, "_verify_param_shape_across_processes", True),
    (ddp, "_sync_module_states", None),
    (dist.Reducer, "_rebuild_buckets", False),
    (dist.Work, "is_completed", True),
)
"""What is done with the memory of tensors, which fake ones do not have, or with other ranks, and what it returns: DDP
compares ranks, and arranges gradients in the order of the first backward pass, in buckets of the same size in all; and
transfers are done at once."""


def assume_first_stage(pipeline: Pipeline) -> int:
    """As `Pipeline.first_trained_stage`, if the first stage is trained whenever one of this rank is."""
    return 0 if any(pipeline.trained_parameters(stage) for stage in pipeline.local_stages) else pipeline.stages


@contextmanager
def fake_mesh(dims: ParallelDims, rank: int, device: str = "cpu") -> Iterator[Mesh | None]:
    """The mesh of a rank, whose collectives compute nothing; None for a single process.

    Args:
        dims: ranks along each axis.
        device: type of the devices.
    """
    if dims.world_size == 1:
        yield None
        return
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=dims.world_size)
    try:
        with ExitStack() as stack:
            for owner, name, answer in DDP_READS:
                stack.enter_context(patch.object(owner, name, return_value=answer))
            stack.enter_context(patch.object(Pipeline, "first_trained_stage", assume_first_stage))
            if device != "cpu":  # C++ may be told of another device than that of a fake tensor (`plan.fake_cuda`)
                device_of = property(lambda tensor: tensor._local_tensor.device)
                stack.enter_context(patch.object(DTensor, "device", device_of, create=True))
            yield Mesh(dims, device)
    finally:
        dist.destroy_process_group()
        _clear_sharding_prop_cache()  # of layouts, which hold the groups of equal meshes
