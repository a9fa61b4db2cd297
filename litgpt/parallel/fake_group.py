"""A process group without other processes: one rank of a layout, whose collectives return at once."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.testing._internal.distributed.fake_pg import FakeStore

from litgpt.parallel.mesh import Mesh
from litgpt.recipe.parallel import ParallelDims


@contextmanager
def fake_mesh(dims: ParallelDims, rank: int) -> Iterator[Mesh | None]:
    """The mesh of a rank, whose collectives compute nothing; None for a single process.

    Args:
        dims: ranks along each axis.
    """
    if dims.world_size == 1:
        yield None
        return
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=dims.world_size)
    try:
        yield Mesh(dims, "cpu")
    finally:
        dist.destroy_process_group()
        _clear_sharding_prop_cache()  # of layouts, which hold the groups of equal meshes
