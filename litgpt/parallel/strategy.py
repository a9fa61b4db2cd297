"""The strategy for Lightning Fabric, which launches, seeds and logs: it builds the device mesh of the processes."""

import os
import sys
from datetime import timedelta

import torch.distributed as dist

from litgpt.parallel import heartbeat
from litgpt.parallel.fabric import ModelParallelStrategy, ParallelStrategy, _get_rank
from litgpt.parallel.mesh import Mesh
from litgpt.recipe.parallel import ParallelDims

HEARTBEAT_TIMEOUT = 60.0  # seconds


class MeshStrategy(ModelParallelStrategy):
    """Starts the processes of a run and arranges them in a device mesh.

    A single process has neither a process group nor a mesh.

    Args:
        dims: ranks along each axis; their product is the number of processes.
        timeout: how long a rank waits for the others before the run fails; at most a minute for a rank without
            heartbeat.
        backend: of the process group; None for the device's default.
    """

    def __init__(
        self, dims: ParallelDims, *, timeout: timedelta = timedelta(minutes=30), backend: str | None = None
    ) -> None:
        super().__init__(parallelize_fn=lambda module, _: module, timeout=timeout, process_group_backend=backend)
        self.dims, self.timeout = dims, timeout
        self.mesh: Mesh | None = None  # None for a single process

    def setup_environment(self) -> None:
        """Initialize the process group, then build the mesh."""
        if self.num_nodes * self.num_processes == 1:
            self._set_world_ranks()
            ParallelStrategy.setup_environment(self)
            return
        ParallelStrategy.setup_environment(self)
        self._rendezvous_after_restart()
        self._setup_distributed()
        heartbeat.start_heartbeat(timeout=min(self.timeout.total_seconds(), HEARTBEAT_TIMEOUT))
        self.mesh = Mesh(self.dims, self.root_device.type)
        self._device_mesh = self.mesh.storage

    def _rendezvous_after_restart(self) -> None:
        """Initialize the process group after a restart by torchrun, whose store still has the old addresses."""
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        if attempt == "0":
            return
        store, rank, world_size = next(dist.rendezvous("env://", timeout=self.timeout))
        attempt_store = dist.PrefixStore(f"attempt-{attempt}", store)
        backend = self._get_process_group_backend()
        dist.init_process_group(backend, store=attempt_store, rank=rank, world_size=world_size, timeout=self.timeout)


def exit_process(code: int) -> None:
    """Exit this process without finalizers, if it is one of several.

    After functional collectives over gloo, the interpreter's own exit aborts in a third of the runs, because a worker
    thread still frees tensors.
    """
    if not dist.is_initialized():
        return
    heartbeat.stop_heartbeat()
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def is_rank_zero() -> bool:
    """Whether this is the process that prints and logs; before the process group exists, as its environment says."""
    return dist.get_rank() == 0 if dist.is_initialized() else not _get_rank()
