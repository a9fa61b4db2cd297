"""Estimate the time of a run: its steps, the use of the GPUs, and the hours that it takes."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch

from litgpt.errors import UserError
from litgpt.model.flops import compute_training_flops
from litgpt.parallel.schedules import split_layers
from litgpt.plan.operations import OperationRecorder
from litgpt.plan.pipeline_time import estimate_pipeline_step, measure_device
from litgpt.plan.planned_media import PlannedMedia
from litgpt.plan.step_time import Machine, estimate_step
from litgpt.recipe.gpu import Gpu
from litgpt.recipe.parallel import ParallelDims
from litgpt.recipe.training import Training
from litgpt.train.run_spec import RunSpec
from litgpt.train.schedule import count_steps


@dataclass(frozen=True)
class RunTime:
    """The estimated time of a run.

    Attributes:
        parts: seconds of a step by `step_time.TIME_PARTS`.
        tokens: of a step, on all GPUs.
        mfu: FLOPs of the model, without what is recomputed, by those of all GPUs at their peak.
        steps: of the run at most; None if they depend on its data alone.
    """

    parts: dict[str, float]
    tokens: int
    mfu: float
    steps: int | None
    gpus: int

    @property
    def seconds(self) -> float:
        """Seconds of a step."""
        return sum(self.parts.values())

    @property
    def tokens_per_second_per_gpu(self) -> float:
        """Tokens of a step by its seconds and the number of GPUs."""
        return self.tokens / self.seconds / self.gpus

    @property
    def hours(self) -> float | None:
        """Hours of the run, without evaluation and saving; None if the number of steps is not known."""
        return None if self.steps is None else self.steps * self.seconds / 3600


def check_timed(recipe: Training, gpu: Gpu) -> None:
    """Check that the time of a recipe on a GPU can be estimated.

    Raises:
        UserError: naming the first setting for which it cannot.
    """
    if recipe.objective != "next_token":
        raise UserError("preference: the time of its losses is not planned; set gpu_memory instead of gpu")
    for setting, cure in list_untimed(recipe, gpu):
        raise UserError(f"{setting}: its time is not planned; set {cure}, or set gpu_memory instead of gpu")


def list_untimed(recipe: Training, gpu: Gpu) -> Iterator[tuple[str, str]]:
    """List the settings whose time is not planned, each with a value whose time is."""
    if recipe.precision == "64-true":  # of which GPUs have no figures
        yield "precision: 64-true", "32-true"
    if recipe.fp8.recipe == "blockwise":  # whose products are kernels with unknown FLOPs
        yield "fp8.recipe: blockwise", "rowwise"
    if recipe.fp8.recipe is not None and gpu.fp8_tflops is None:
        yield f"fp8.recipe: {recipe.fp8.recipe} on a GPU without fp8_tflops", "null"
    if recipe.parallel.cpu_offload:
        yield "parallel.cpu_offload: true", "false"
    if recipe.recompute.offload:
        yield "recompute.offload: true", "false"
    if fraction := getattr(recipe.optimizer, "offload_fraction", 0):
        yield f"optimizer.offload_fraction: {fraction}", "0"


def estimate_run_time(
    recipe: Training,
    spec: RunSpec,
    dims: ParallelDims,
    gpu: Gpu,
    *,
    length: int,
    recorders: Mapping[int, OperationRecorder],
    media: PlannedMedia | None = None,
) -> RunTime:
    """Estimate the time of a run from the operations of one rank of each device of the pipeline.

    Args:
        length: tokens per row.
        recorders: by the index of the device.
        media: of each row.
    """
    machine = Machine(gpu, dims.world_size // recipe.num_nodes)
    micro_batches = recipe.train.accumulation(dims.data_ranks)
    if dims.pipeline > 1:
        syncs_each, schedule = recipe.parallel.level == 3, recipe.parallel.pipeline_schedule
        devices = [
            measure_device(recorder.operations, machine, planned=recorder.micro_batches, syncs_each=syncs_each)
            for _, recorder in sorted(recorders.items())  # of devices that are alike, the same one
        ]
        stages = len(split_layers(recipe.parallel, spec.config.n_layer))
        parts = estimate_pipeline_step(devices, schedule=schedule, stages=stages, micro_batches=micro_batches)
    else:
        recorder = recorders[0]
        parts = estimate_step(recorder.operations, machine, planned=recorder.micro_batches, micro_batches=micro_batches)
    tokens = recipe.train.global_batch_size * length
    trained = spec.measure_trained_shares()
    sizes = None if media is None else media.measure(recipe.train.global_batch_size)
    flops = compute_training_flops(spec.config, tokens=tokens, sequence_length=length, trained=trained, media=sizes)
    peak = machine.find_peak(torch.float32 if recipe.precision == "32-true" else torch.bfloat16)
    mfu = flops / sum(parts.values()) / (peak * dims.world_size)
    steps = count_steps(replace(recipe.train, epochs=None), length, None)
    return RunTime(parts, tokens, mfu, steps, dims.world_size)
