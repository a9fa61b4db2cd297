"""Build this rank's model, with its layout, its weights and its optimizers."""

import torch

from litgpt import adapt
from litgpt.adapt import neftune, quantization
from litgpt.model.gpt import GPT
from litgpt.parallel.apply import apply_ddp, init_mixed_precision, parallelize
from litgpt.parallel.fp8 import apply_fp8
from litgpt.parallel.mesh import Mesh
from litgpt.parallel.precision import build_precision
from litgpt.recipe.parallel import ParallelDims
from litgpt.recipe.training import Training
from litgpt.train.gated_product import recompute_products
from litgpt.train.guard import LossScale
from litgpt.train.initial_weights import build_reference, fill_model
from litgpt.train.optimizer import allocate_states, build_optimizers
from litgpt.train.router_training import RouterTrainer
from litgpt.train.run_spec import RunSpec
from litgpt.train.step_timers import StepTimers
from litgpt.train.train_state import TrainState


def build_train_state(
    recipe: Training,
    spec: RunSpec,
    mesh: Mesh | None,
    device: torch.device,
    *,
    resumed: bool,
    steps: int | None = None,
    meta_model: GPT | None = None,
) -> TrainState:
    """Build this rank's model with its initial weights, and the optimizers.

    Args:
        steps: of the whole run; None if it has no limit on steps.
        resumed: whether a checkpoint will be loaded; tensors that it holds are not initialized.
        meta_model: the model from `build_meta_model`, if there is one already.
    """
    model = meta_model or build_meta_model(recipe, spec, mesh, device)
    precision = build_precision(recipe.precision, recipe.parallel.reduce_dtype)
    model.to_empty(device="cpu" if recipe.parallel.cpu_offload else device)
    starts_over = not resumed or spec.scores_ahead
    fill_model(model, spec, recipe.seed, device, resumed=not starts_over)
    reference = build_reference(model, spec, recipe.seed, device, resumed=resumed) if starts_over else None
    if mesh is None and uses_cpu_paths(device) and not is_compiled(recipe, device):
        recompute_products(model)
    optimizers = build_optimizers(recipe.optimizer, model, spec.tuner, spec.rates)
    if mesh is None and uses_cpu_paths(device) and not resumed and spec.tuner is None and not model.towers:
        for optimizer in optimizers:
            allocate_states(optimizer)
    schedule = adapt.build_schedule(model, spec.tuner, recipe.seed, steps) if spec.tuner else None
    if schedule:
        init_mixed_precision(model)
        schedule.begin_step(0)
    scale = LossScale(active=precision.scaled)
    wrapped = apply_ddp(model, mesh, precision.reduce)
    state = TrainState(wrapped, optimizers, device, precision, mesh, scale, schedule, reference)
    state.timers = StepTimers(device) if recipe.log.timers else None
    state.routers = RouterTrainer(recipe.moe, model, mesh) if spec.config.n_expert else None
    return state


def uses_cpu_paths(device: torch.device) -> bool:
    """Whether a model in one process is computed, and its states are allocated, in the ways that need less on a CPU."""
    return device.type == "cpu"


def is_compiled(recipe: Training, device: torch.device) -> bool:
    """Whether the blocks of the model are compiled."""
    return recipe.compile if recipe.compile is not None else device.type == "cuda" and not recipe.recompute.offload


def build_meta_model(recipe: Training, spec: RunSpec, mesh: Mesh | None, device: torch.device) -> GPT:
    """Build this rank's part of the model on the meta device: quantized, adapted, split and sharded."""
    precision = build_precision(recipe.precision, recipe.parallel.reduce_dtype)
    model = GPT.on_meta(spec.config).to(precision.storage)
    if spec.quantize:
        quantization.quantize(model, spec.quantize)
    spec.select_trained(model)
    if spec.noise:
        neftune.add_embedding_noise(model, spec.noise)
    dims = ParallelDims() if mesh is None else mesh.dims
    model.amax_history = apply_fp8(model, recipe.fp8, dims, device)  # type: ignore[assignment]
    parallelize(
        model,
        mesh,
        recipe.parallel,
        precision=precision,
        compile_blocks=is_compiled(recipe, device),
        recompute=recipe.recompute,
    )
    return model
