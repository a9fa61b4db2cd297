"""The ranks of a run that are alike, of which one is planned: those of a device of a pipeline, and of equal devices."""

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch

from litgpt import adapt
from litgpt.errors import UserError
from litgpt.model.gpt import GPT
from litgpt.parallel.model_sizes import assign_layers
from litgpt.parallel.schedules import (
    BACKWARD,
    FORWARD,
    WEIGHT,
    Task,
    assign_devices,
    build_pipeline_schedule,
    split_layers,
)
from litgpt.plan.accelerator_paths import accelerator_paths
from litgpt.recipe.parallel import ParallelDims
from litgpt.recipe.training import Training
from litgpt.train.build_state import build_meta_model
from litgpt.train.run_spec import RunSpec


@dataclass(frozen=True)
class AlikeRanks:
    """Ranks with the same layers and the same place in their node.

    Attributes:
        rank: the first one of the device that holds the most micro-batches, so that no other one needs more memory.
        devices: their indices along the pipeline.
        number: of ranks.
        micro_batches: of a step that is planned for them.
    """

    rank: int
    devices: tuple[int, ...]
    number: int
    micro_batches: int


class Load(NamedTuple):
    """What a device of a pipeline holds at most.

    Attributes:
        held: micro-batches whose backward is not done, of all of its stages.
        held_with_gradients: as many, once each of its stages has gradients.
    """

    held: int
    held_with_gradients: int


def group_ranks(recipe: Training, spec: RunSpec, dims: ParallelDims) -> list[AlikeRanks]:
    """Group the ranks of a run, in order of the first device of each group.

    The ranks of a device of the pipeline need the same or, of uneven shards, less than its first one.
    """
    size = dims.world_size // dims.pipeline
    if dims.pipeline == 1:
        return [AlikeRanks(0, (0,), size, min(recipe.train.accumulation(dims.data_ranks), 2))]
    groups: dict[Hashable, list[int]] = {}
    for device, kind in enumerate(describe_devices(recipe, spec, dims)):
        groups.setdefault(kind, []).append(device)
    loads = list(measure_loads(recipe, spec, dims))
    alike = []
    for devices in groups.values():
        largest = max(devices, key=lambda device: (loads[device][0], -device))
        alike.append(AlikeRanks(largest * size, tuple(devices), size * len(devices), loads[largest][1]))
    return alike


def isolate_rank(recipe: Training, spec: RunSpec, dims: ParallelDims, rank: int) -> AlikeRanks:
    """One rank as a group of its own.

    Raises:
        UserError: if the run has no such rank.
    """
    if rank >= dims.world_size:
        last = dims.world_size - 1
        raise UserError(f"rank: {rank} is not one of the {dims.world_size} ranks of the run; set at most {last}")
    device = rank * dims.pipeline // dims.world_size
    if dims.pipeline == 1:
        return replace(group_ranks(recipe, spec, dims)[0], rank=rank, number=1)
    loads = list(measure_loads(recipe, spec, dims))
    return AlikeRanks(rank, (device,), 1, loads[device][1])


def describe_devices(recipe: Training, spec: RunSpec, dims: ParallelDims) -> list[Hashable]:
    """What makes the devices of a pipeline different: their layers, both ends of the model, and their place in a node.

    Layers that a tuner trains in turns are not compared.
    """
    stages = assign_layers(recipe.parallel, spec.config, spec.config.n_layer)
    owners = assign_devices(recipe.parallel.pipeline_schedule, dims.pipeline, len(stages))
    if spec.tuner is not None and type(spec.tuner) in adapt.TUNER_SCHEDULES:
        return list(range(dims.pipeline))
    with accelerator_paths():
        layers = describe_blocks(build_meta_model(recipe, spec, None, torch.device("cpu")))
    size, per_node = dims.world_size // dims.pipeline, dims.world_size // recipe.num_nodes
    devices: list[Hashable] = []
    for device in range(dims.pipeline):
        local = [stage for stage in range(len(stages)) if owners[stage] == device]
        ends = [stage for stage in local if stage in (0, len(stages) - 1)]
        kinds = tuple(tuple(layers[layer] for layer in stages[stage]) for stage in local)
        devices.append((kinds, tuple(ends), device * size % per_node if recipe.num_nodes > 1 else None))
    return devices


def describe_blocks(model: GPT) -> list[Hashable]:
    """What makes the layers of a model different: their modules, their parameters and the window of attention."""
    return [
        (
            repr(block),
            tuple((name, value.shape, value.dtype, value.requires_grad) for name, value in block.named_parameters()),
            model.config.is_local(layer),
        )
        for layer, block in enumerate(model.blocks[: model.config.n_layer])
    ]


def measure_loads(recipe: Training, spec: RunSpec, dims: ParallelDims) -> Iterator[tuple[Load, int]]:
    """What each device of a pipeline holds in a step, and in a step of how many micro-batches it already does so."""
    total = recipe.train.accumulation(dims.data_ranks)
    stages = len(split_layers(recipe.parallel, spec.config.n_layer))
    schedule = partial(build_pipeline_schedule, recipe.parallel.pipeline_schedule, dims.pipeline, stages)
    for device in range(dims.pipeline):
        load = measure_load(schedule(total)[device])
        fewest = max(1, load.held * dims.pipeline // stages)
        yield load, next(n for n in range(fewest, total + 1) if measure_load(schedule(n)[device]) == load)


def measure_load(tasks: Sequence[Task]) -> Load:
    """What a device holds at most while it runs some tasks."""
    held = most = later = 0
    ran: set[int] = set()
    local_stages = {task.stage for task in tasks}
    for task in tasks:
        held += task.kind == FORWARD
        most = max(most, held)
        later = max(later, held) if ran == local_stages else later
        if task.kind in (BACKWARD, WEIGHT):
            held -= 1
            ran.add(task.stage)
    return Load(most, later)
