"""Start the processes of a run."""

import logging
from datetime import timedelta

import torch
from lightning.fabric import Fabric
from lightning.fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment

from litgpt.errors import UserError
from litgpt.parallel.strategy import MeshStrategy
from litgpt.phases import phase
from litgpt.recipe.training import Training
from litgpt.train.host_allocator import keep_freed_memory


def count_processes(recipe: Training) -> int:
    """Count the processes of the run: those started by torchrun or SLURM, else `devices` x `num_nodes`."""
    for environment in (TorchElasticEnvironment, SLURMEnvironment):
        if environment.detect():
            world = environment().world_size()
            devices = recipe.devices
            if isinstance(devices, int) and devices > 0 and devices * recipe.num_nodes != world:
                raise UserError(
                    f"devices x num_nodes: {devices} x {recipe.num_nodes} is not {world}, the number of processes that "
                    "were started; set devices: auto"
                )
            return world
    if recipe.devices in ("auto", -1):
        return max(1, torch.cuda.device_count()) * recipe.num_nodes
    return int(recipe.devices) * recipe.num_nodes


def launch(recipe: Training) -> Fabric:
    """Start the processes of a run and seed each of them.

    Raises:
        UserError: if the layout does not fit the number of processes.
    """
    world = count_processes(recipe)
    accelerator = "cuda" if torch.cuda.is_available() else "cpu"
    dims = recipe.parallel.resolve_dims(world, num_nodes=recipe.num_nodes)
    recipe.train.accumulation(dims.data_ranks)
    per_node, rest = divmod(world, recipe.num_nodes)
    if rest:
        raise UserError(f"num_nodes: {recipe.num_nodes} does not divide the {world} processes that were started")
    if accelerator == "cuda" and per_node > torch.cuda.device_count():
        raise UserError(f"devices: {per_node} is more than the number of GPUs; use at most {torch.cuda.device_count()}")
    # with offload, gradients are on the CPU, and so their norms are reduced there
    backend = "cpu:gloo,cuda:nccl" if accelerator == "cuda" and recipe.parallel.cpu_offload else None
    fabric = Fabric(
        accelerator=accelerator,
        devices=per_node,
        num_nodes=recipe.num_nodes,
        strategy=MeshStrategy(dims, timeout=timedelta(minutes=recipe.parallel.timeout_minutes), backend=backend),
        precision="32-true",  # FSDP2 and autocast apply the recipe's precision, not Fabric
    )
    for package in ("lightning.fabric", "lightning.pytorch"):  # without banners, which both of them write
        logging.getLogger(package).setLevel(logging.WARNING)
    with phase(f"starting {per_node} processes" if per_node > 1 else "starting"):
        fabric.launch()
    # for dropout: ranks that compute the same tokens need the same seed; initialization and data have own generators
    ranks_per_seed = 1 if recipe.parallel.sequence else dims.tensor
    fabric.seed_everything(recipe.seed + fabric.global_rank // ranks_per_seed, verbose=False)
    if accelerator == "cuda":
        torch.set_float32_matmul_precision("high")
    else:
        keep_freed_memory()
    return fabric
