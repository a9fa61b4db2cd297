"""Our Fabric strategy: Fabric launches, seeds and logs; the strategy holds the mesh of processes."""

import os
import sys
from datetime import timedelta

import torch.distributed as dist
from lightning.fabric.strategies.model_parallel import ModelParallelStrategy
from lightning.fabric.strategies.parallel import ParallelStrategy
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

AXES = ("data_replicate", "data_shard")  # slowest rank first; tensor, context, pipeline and expert axes join here


class MeshStrategy(ModelParallelStrategy):
    """Starts the processes of a run and arranges them in a mesh named by `AXES`.

    One process alone needs no process group and has no mesh.

    Args:
        degrees: ranks along each of `AXES`; their product is the number of processes.
        timeout: how long a rank waits for the others before the run is given up.
    """

    def __init__(self, degrees: tuple[int, ...], *, timeout: timedelta = timedelta(minutes=30)) -> None:
        super().__init__(parallelize_fn=lambda module, _: module, timeout=timeout)
        self.degrees = degrees

    @property
    def mesh(self) -> DeviceMesh | None:
        """The mesh of all processes, or None for one process alone."""
        return self._device_mesh

    def setup_environment(self) -> None:
        """Join the other processes, then lay them out."""
        if self.num_nodes * self.num_processes == 1:
            self._set_world_ranks()
            ParallelStrategy.setup_environment(self)
            return
        ParallelStrategy.setup_environment(self)
        self._setup_distributed()
        self._device_mesh = init_device_mesh(self.root_device.type, self.degrees, mesh_dim_names=AXES)


def leave(code: int) -> None:
    """End this process, if it is one of several, without running finalisers.

    After functional collectives over gloo the interpreter's own exit aborts in a third of the runs, while a worker
    thread still frees tensors.
    """
    if not dist.is_initialized():
        return
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def is_first() -> bool:
    """Whether this process is the one that speaks to the user."""
    return not dist.is_initialized() or dist.get_rank() == 0
