"""The devices of this machine, on which a run is planned that would start here."""

import os
import resource
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from litgpt.errors import UserError
from litgpt.parallel.processes import count_processes
from litgpt.plan.run_time import check_timed
from litgpt.plan.table import GIB
from litgpt.recipe.gpu import Gpu, find_gpu
from litgpt.recipe.training import Training

CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")  # of a container


@dataclass(frozen=True)
class OwnMachine:
    """The device of each process of a run, as a `PlannedDevice`.

    Attributes:
        gpu_label: the name of the device, for messages.
        available_memory: GiB of each process.
        figures: of the GPU; None if they are not known, or the time of the recipe is not planned.
    """

    gpu_label: str
    available_memory: float
    figures: Gpu | None = None
    price_per_hour: float | None = None


def find_own_machine(recipe: Training) -> OwnMachine:
    """The device of a process of a run that starts here: its first GPU, or an equal share of host memory."""
    if torch.cuda.is_available():
        name, memory = torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).total_memory / GIB
        figures = find_gpu(name, memory)
        with suppress(UserError):  # its memory is planned without its time
            if figures is not None:
                check_timed(recipe, figures)
                return OwnMachine(name, round(memory, 2), figures)
        return OwnMachine(name, round(memory, 2))
    processes = max(1, count_processes(recipe.devices, recipe.num_nodes) // recipe.num_nodes)
    name = "host memory" if processes == 1 else f"host memory for each of {processes} processes"
    return OwnMachine(name, round(measure_host_memory() / processes / GIB, 2))


def measure_host_memory() -> int:
    """Bytes of host memory, or of its part that this process may use."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    if CGROUP_LIMIT.is_file() and (limit := CGROUP_LIMIT.read_text().strip()).isdigit():
        limits.append(int(limit))
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    if soft != resource.RLIM_INFINITY:
        limits.append(soft)
    return min(limits)
