"""Our Fabric strategy: Fabric launches, seeds and logs; the strategy holds the mesh of processes."""

import os
import sys
from datetime import timedelta

import torch.distributed as dist
from lightning.fabric.strategies.model_parallel import ModelParallelStrategy
from lightning.fabric.strategies.parallel import ParallelStrategy

from litgpt.parallel import heartbeat
from litgpt.parallel.mesh import Mesh
from litgpt.recipe.parallel import ParallelDims

HEARTBEAT_TIMEOUT = 60.0  # seconds; a process that lives gives a sign of it every second


class MeshStrategy(ModelParallelStrategy):
    """Starts the processes of a run and arranges them in a mesh.

    One process alone needs no process group and has no mesh.

    Args:
        dims: ranks along each axis; their product is the number of processes.
        timeout: how long a rank waits for the others before the run is given up; for a rank that shows no life, a
            minute at most.
        backend: of the process group; None for the one of the device.
    """

    def __init__(
        self, dims: ParallelDims, *, timeout: timedelta = timedelta(minutes=30), backend: str | None = None
    ) -> None:
        super().__init__(parallelize_fn=lambda module, _: module, timeout=timeout, process_group_backend=backend)
        self.dims, self.timeout = dims, timeout
        self.mesh: Mesh | None = None  # of all processes; one alone has none

    def setup_environment(self) -> None:
        """Join the other processes, then lay them out."""
        if self.num_nodes * self.num_processes == 1:
            self._set_world_ranks()
            ParallelStrategy.setup_environment(self)
            return
        ParallelStrategy.setup_environment(self)
        self._meet_again()
        self._setup_distributed()
        heartbeat.start_heartbeat(silence=min(self.timeout.total_seconds(), HEARTBEAT_TIMEOUT))
        self.mesh = Mesh(self.dims, self.root_device.type)
        self._device_mesh = self.mesh.storage

    def _meet_again(self) -> None:
        """Join the others after a restart by torchrun, in whose store the addresses of the dead still stand."""
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        if attempt == "0":
            return
        store, rank, ranks = next(dist.rendezvous("env://", timeout=self.timeout))
        apart = dist.PrefixStore(f"attempt-{attempt}", store)
        backend = self._get_process_group_backend()
        dist.init_process_group(backend, store=apart, rank=rank, world_size=ranks, timeout=self.timeout)


def exit_process(code: int) -> None:
    """End this process, if it is one of several, without running finalisers.

    After functional collectives over gloo the interpreter's own exit aborts in a third of the runs, while a worker
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
    """Whether this process is the one that speaks to the user."""
    return not dist.is_initialized() or dist.get_rank() == 0
