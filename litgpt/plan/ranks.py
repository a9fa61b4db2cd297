"""The plan of a run: the memory of each rank that differs from the others."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from litgpt.errors import UserError
from litgpt.model.config import Config
from litgpt.parallel.fake_group import fake_mesh
from litgpt.parallel.model_sizes import check_model_sizes
from litgpt.parallel.processes import count_processes
from litgpt.plan.alike_ranks import AlikeRanks, group_ranks, isolate_rank
from litgpt.plan.memory import StepMemory, plan_step_memory
from litgpt.plan.operations import OperationRecorder
from litgpt.plan.planned_media import PlannedMedia, choose_media
from litgpt.plan.routed_rows import RoutedRows
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
        ranks: the memory of one rank of each kind, none of which needs more.
        alike: the number of ranks that each of them stands for.
        time: of the run; None if no GPU was given.
        media: of each row; None without any.
    """

    dims: ParallelDims
    length: int
    ranks: dict[int, StepMemory]
    alike: dict[int, int]
    time: RunTime | None = None
    media: PlannedMedia | None = None

    @property
    def worst(self) -> int:
        """The rank that needs the most memory."""
        return max(self.ranks, key=lambda rank: self.ranks[rank].peak)


def plan_run(
    recipe: Training, spec: RunSpec, gpu: Gpu | None = None, *, routing_skew: float = 1.0, rank: int | None = None
) -> RunPlan:
    """Plan a run, whose processes are `devices` x `num_nodes`.

    Args:
        gpu: on which its time is estimated.
        routing_skew: rows of the rank whose experts are the busiest, relative to the mean.
        rank: the only one whose memory is counted; None for one of each kind.

    Raises:
        UserError: as `resolve_run`, for a rank that the run does not have, and for a precision whose time is not
            estimated.
    """
    length, dims = resolve_run(recipe, spec)
    check_skew(routing_skew, recipe, dims)
    if gpu is not None:
        check_timed(recipe, gpu)
    media = choose_media(spec, length)
    routed = RoutedRows(routing_skew, recipe.moe.expert_capacity_factor)
    steps = recipe.train.max_steps or TYPICAL_STEPS
    fused = is_compiled(recipe, torch.device("cuda"))

    def plan_rank(alike: AlikeRanks, operations: OperationRecorder | None) -> StepMemory:
        settings: dict[str, Any] = {"length": length, "steps": steps, "routed": routed, "media": media}
        settings |= {"operations": operations, "micro_batches": alike.micro_batches}
        with fake_mesh(dims, alike.rank) as mesh:
            return plan_step_memory(recipe, spec, mesh, **settings)

    asked = None if rank is None else isolate_rank(recipe, spec, dims, rank)
    groups = group_ranks(recipe, spec, dims) if asked is None or gpu is not None else []
    recorders = {} if gpu is None else {group.rank: OperationRecorder(fused=fused) for group in groups}
    ranks = {group.rank: plan_rank(group, recorders.get(group.rank)) for group in groups}
    if asked is not None:
        ranks = {asked.rank: ranks.get(asked.rank) or plan_rank(asked, None)}
    numbers = {group.rank: group.number for group in ([asked] if asked else groups)}
    time = None
    if gpu is not None:
        of_devices = {device: recorders[group.rank] for group in groups for device in group.devices}
        time = estimate_run_time(recipe, spec, dims, gpu, length=length, recorders=of_devices, media=media)
    return RunPlan(dims, length, ranks, numbers, time, media)


def resolve_run(recipe: Training, spec: RunSpec) -> tuple[int, ParallelDims]:
    """The tokens per row, and the ranks along each axis.

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
    check_planned(recipe, spec)
    return length, dims


def check_skew(skew: float, recipe: Training, dims: ParallelDims) -> None:
    """Check that the busiest rank can get more rows than others, and so many.

    Raises:
        UserError: naming the largest skew.
    """
    if skew == 1:
        return
    key, factor = f"routing_skew: {skew:g}", recipe.moe.expert_capacity_factor
    if dims.expert == 1 or recipe.moe.pad_expert_input_to_capacity:
        other = "parallel.expert: 1" if dims.expert == 1 else "moe.pad_expert_input_to_capacity: true"
        raise UserError(f"{key} has no effect with {other}; set routing_skew: 1")
    if skew > dims.expert:
        raise UserError(f"{key} is more than parallel.expert: {dims.expert}, all rows; set at most {dims.expert}")
    if factor is not None and skew > max(1.0, factor):
        raise UserError(f"{key} is more than moe.expert_capacity_factor: {factor:g} lets experts have; set {factor:g}")


def check_planned(recipe: Training, spec: RunSpec) -> None:
    """Check that the memory of a recipe can be counted.

    Raises:
        UserError: naming the first setting for which it cannot.
    """
    for setting, cure in list_unplanned(recipe, spec.config):
        raise UserError(f"{setting} is not planned yet; {cure}")


def list_unplanned(recipe: Training, config: Config) -> Iterator[tuple[str, str]]:
    """List the settings that are not planned yet, each with one that is."""
    if recipe.fp8.recipe == "mxfp8":  # whose kernels are compiled when they are first called
        yield "fp8.recipe: mxfp8", "set rowwise"
    if config.n_expert:
        yield from list_unplanned_experts(recipe, config)


def list_unplanned_experts(recipe: Training, config: Config) -> Iterator[tuple[str, str]]:
    """As `list_unplanned`, for a model with experts, whose products are computed on fake tensors in 16 bits only."""
    if recipe.precision in ("32-true", "64-true"):
        yield f"precision: {recipe.precision} with experts", "set bf16-mixed"
    for name in ("n_embd", "moe_intermediate_size"):
        if (size := getattr(config, name)) and size % 8:
            yield f"model_config.{name}: {size} with experts", f"set {-(-size // 8) * 8}"
