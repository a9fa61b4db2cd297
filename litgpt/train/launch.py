"""Start the processes of a run."""

from datetime import timedelta

import torch

from litgpt.host_allocator import keep_freed_memory
from litgpt.parallel.fabric import Fabric
from litgpt.parallel.processes import count_processes, start_processes
from litgpt.recipe.training import Training


def launch(recipe: Training) -> Fabric:
    """Start the processes of a run and seed each of them.

    Raises:
        UserError: if the layout does not fit the number of processes.
    """
    world = count_processes(recipe.devices, recipe.num_nodes)
    dims = recipe.parallel.resolve_dims(world, num_nodes=recipe.num_nodes)
    recipe.train.accumulation(dims.data_ranks)
    # with offload, gradients are on the CPU, and so their norms are reduced there
    needs_both = torch.cuda.is_available() and recipe.parallel.cpu_offload
    fabric = start_processes(
        dims,
        num_nodes=recipe.num_nodes,
        timeout=timedelta(minutes=recipe.parallel.timeout_minutes),
        backend="cpu:gloo,cuda:nccl" if needs_both else None,
    )
    # for dropout: ranks that compute the same tokens need the same seed; initialization and data have own generators
    ranks_per_seed = 1 if recipe.parallel.sequence else dims.tensor
    fabric.seed_everything(recipe.seed + fabric.global_rank // ranks_per_seed, verbose=False)
    if not torch.cuda.is_available():
        keep_freed_memory(shared=True)
    return fabric
