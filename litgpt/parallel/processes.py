"""Start the processes of a command, with a device and a rank for each."""

import logging
from datetime import timedelta

import torch

from litgpt.errors import UserError
from litgpt.parallel.fabric import Fabric, SLURMEnvironment, TorchElasticEnvironment
from litgpt.parallel.strategy import MeshStrategy
from litgpt.phases import phase
from litgpt.recipe.parallel import ParallelDims


def count_processes(devices: int | str, num_nodes: int = 1) -> int:
    """Count the processes: those started by torchrun or SLURM, else `devices` x `num_nodes`.

    Args:
        devices: of each node; auto or -1 for all GPUs, or one CPU process without GPUs.

    Raises:
        UserError: if another number was started.
    """
    for environment in (TorchElasticEnvironment, SLURMEnvironment):
        if environment.detect():
            world = environment().world_size()
            if isinstance(devices, int) and devices > 0 and devices * num_nodes != world:
                raise UserError(
                    f"devices x num_nodes: {devices} x {num_nodes} is not {world}, the number of processes that "
                    "were started; set devices: auto"
                )
            return world
    if devices in ("auto", -1):
        return max(1, torch.cuda.device_count()) * num_nodes
    return int(devices) * num_nodes


def start_processes(
    dims: ParallelDims,
    *,
    num_nodes: int = 1,
    timeout: timedelta = timedelta(minutes=30),
    backend: str | None = None,
) -> Fabric:
    """Start the processes of a layout, unless torchrun or SLURM has; each returns from here.

    Args:
        timeout, backend: as in `MeshStrategy`.

    Raises:
        UserError: if there are not as many devices.
    """
    accelerator = "cuda" if torch.cuda.is_available() else "cpu"
    per_node, rest = divmod(dims.world_size, num_nodes)
    if rest:
        raise UserError(f"num_nodes: {num_nodes} does not divide the {dims.world_size} processes that were started")
    if accelerator == "cuda" and per_node > torch.cuda.device_count():
        raise UserError(f"devices: {per_node} is more than the number of GPUs; use at most {torch.cuda.device_count()}")
    fabric = Fabric(
        accelerator=accelerator,
        devices=per_node,
        num_nodes=num_nodes,
        strategy=MeshStrategy(dims, timeout=timeout, backend=backend),
        precision="32-true",  # FSDP2 and autocast apply the recipe's precision, not Fabric
    )
    for package in ("lightning.fabric", "lightning.pytorch"):  # without banners, which both of them write
        logging.getLogger(package).setLevel(logging.WARNING)
    with phase(f"starting {per_node} processes" if per_node > 1 else "starting"):
        fabric.launch()
    if accelerator == "cuda":
        torch.set_float32_matmul_precision("high")
    return fabric
