"""The plan of a run: the memory of each rank that differs from the others."""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import torch

from litgpt.errors import UserError
from litgpt.model.config import Config
from litgpt.parallel.fake_group import fake_mesh
from litgpt.parallel.model_sizes import check_model_sizes
from litgpt.parallel.processes import count_processes
from litgpt.plan.memory import StepMemory, plan_step_memory
from litgpt.plan.operations import OperationRecorder
from litgpt.plan.run_time import RunTime, check_timed, estimate_run_time
from litgpt.recipe.gpu import Gpu
from litgpt.recipe.parallel import ParallelDims
from litgpt.recipe.training import Training
from litgpt.train.build_state import is_compiled
from litgpt.train.early_checks import check_fp8, check_predictions, check_routing, resolve_sequence_length
from litgpt.train.run_spec import RunSpec

TYPICAL_STEPS = 1000  # of a run whose number of steps depends on its data


@dataclass(frozen=True)
class RunPlan:
    """The memory of a run.

    Attributes:
        dims: ranks along each axis.
        length: tokens per row.
        ranks: the memory of one rank of each kind.
        alike: number of ranks of each kind.
        time: of the run; None if no GPU was given.
    """

    dims: ParallelDims
    length: int
    ranks: dict[int, StepMemory]
    alike: int
    time: RunTime | None = None

    @property
    def worst(self) -> int:
        """The rank that needs the most memory."""
        return max(self.ranks, key=lambda rank: self.ranks[rank].peak)


def plan_run(recipe: Training, spec: RunSpec, gpu: Gpu | None = None) -> RunPlan:
    """Plan a run, whose processes are `devices` x `num_nodes`.

    Args:
        gpu: on which its time is estimated.

    Raises:
        UserError: if the recipe is not valid for the model, or has a setting that is not planned yet.
    """
    length = resolve_sequence_length(recipe, spec.config)
    check_routing(recipe.moe, spec.config, adapted=spec.adapted)
    check_predictions(recipe, spec.config, adapted=spec.adapted)
    check_fp8(recipe.fp8, adapted=spec.adapted)
    world = count_processes(recipe.devices, recipe.num_nodes)
    dims = recipe.parallel.resolve_dims(world, num_nodes=recipe.num_nodes)
    check_model_sizes(recipe.parallel, dims, spec.config, spec.config.n_layer)
    recipe.train.accumulation(dims.data_ranks)
    check_planned(recipe, spec, dims)
    if gpu is not None:
        check_timed(recipe)
    steps = recipe.train.max_steps or TYPICAL_STEPS
    ranks = {}
    recorders: dict[int, OperationRecorder] = {}
    fused = is_compiled(recipe, torch.device("cuda"))
    for rank in list_different_ranks(dims):
        with ExitStack() as stack:
            mesh = stack.enter_context(fake_mesh(dims, rank))
            if gpu is not None:
                recorders[rank] = OperationRecorder(fused=fused)
            operations = recorders.get(rank)
            ranks[rank] = plan_step_memory(recipe, spec, mesh, length=length, steps=steps, operations=operations)
    time = None
    if gpu is not None:
        time = estimate_run_time(recipe, spec, dims, gpu, length=length, recorders=recorders)
    return RunPlan(dims, length, ranks, dims.world_size // len(ranks), time)


def list_different_ranks(dims: ParallelDims) -> list[int]:
    """The first rank of each pipeline stage; the others of a stage need the same or, of uneven shards, less."""
    return list(range(0, dims.world_size, dims.world_size // dims.pipeline))


def check_planned(recipe: Training, spec: RunSpec, dims: ParallelDims) -> None:
    """Check that the memory of a recipe can be counted.

    Raises:
        UserError: naming the first setting for which it cannot.
    """
    for setting, cure in list_unplanned(recipe, spec.config, dims):
        raise UserError(f"{setting} is not planned yet; {cure}")


def list_unplanned(recipe: Training, config: Config, dims: ParallelDims) -> Iterator[tuple[str, str]]:
    """List the settings that are not planned yet, each with one that is."""
    if dims.world_size > 1 and dims.world_size == dims.data_replicate:
        yield (
            f"parallel.data_replicate: {dims.data_replicate} alone (DDP)",
            "plan one process, with devices: 1",
        )
    if dims.expert * dims.expert_tensor > 1:
        key = "expert" if dims.expert > 1 else "expert_tensor"
        yield f"parallel.{key}: {getattr(dims, key)}", f"set parallel.{key}: 1"
    if recipe.parallel.cpu_offload:
        yield "parallel.cpu_offload: true", "set false"
    if recipe.recompute.offload:
        yield "recompute.offload: true", "set false"
    if recipe.fp8.recipe is not None:
        yield f"fp8.recipe: {recipe.fp8.recipe}", "set null"
    if getattr(recipe.optimizer, "offload_fraction", 0):
        yield f"optimizer.offload_fraction: {recipe.optimizer.offload_fraction}", "set 0"  # type: ignore[attr-defined]
    if config.n_expert:
        yield from list_unplanned_experts(recipe, config)


def list_unplanned_experts(recipe: Training, config: Config) -> Iterator[tuple[str, str]]:
    """As `list_unplanned`, for a model with experts, whose products are computed on fake tensors in 16 bits only."""
    if recipe.precision in ("32-true", "64-true"):
        yield f"precision: {recipe.precision} with experts", "set bf16-mixed"
    for name in ("n_embd", "moe_intermediate_size"):
        if (size := getattr(config, name)) and size % 8:
            yield f"model_config.{name}: {size} with experts", f"set {-(-size // 8) * 8}"
    if recipe.moe.expert_capacity_factor is not None:
        yield f"moe.expert_capacity_factor: {recipe.moe.expert_capacity_factor}", "set null"
