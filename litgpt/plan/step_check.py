"""Run the training step of a rank on fake tensors of a GPU, and say what would fail, or make it wait."""

from collections.abc import Iterable
from dataclasses import replace
from unittest.mock import patch

from litgpt.parallel.fake_group import fake_mesh
from litgpt.parallel.mesh import Mesh
from litgpt.parallel.precision import build_precision
from litgpt.plan.alike_ranks import group_ranks
from litgpt.plan.batches import build_batches
from litgpt.plan.fake_cuda import DEVICE, DeviceFactories, HostEvent, cuda_functions, fake_cuda
from litgpt.plan.fake_tensors import fake_tensors
from litgpt.plan.memory import leave_scores_ahead
from litgpt.plan.ranks import TYPICAL_STEPS, resolve_run
from litgpt.plan.routed_rows import RoutedRows
from litgpt.plan.step_findings import Finding, ObservedPhases, StepObserver
from litgpt.recipe.parallel import ParallelDims
from litgpt.recipe.training import Training
from litgpt.train.build_state import build_meta_model, build_train_state
from litgpt.train.initial_weights import build_reference
from litgpt.train.objectives import build_objective
from litgpt.train.run_spec import RunSpec
from litgpt.train.step import train_step


def check_run_steps(recipe: Training, spec: RunSpec, ranks: Iterable[int] | None = None) -> dict[Finding, int]:
    """Take a step of some ranks of a run; returns what was found, and the first rank that it was found on.

    Args:
        ranks: None for one of each kind.

    Raises:
        UserError: if the recipe is not valid for the model, or has a setting that is not planned yet.
    """
    length, dims = resolve_run(recipe, spec)
    first_ranks: dict[Finding, int] = {}
    for rank in [alike.rank for alike in group_ranks(recipe, spec, dims)] if ranks is None else ranks:
        with fake_mesh(dims, rank, DEVICE.type) as mesh:
            for finding in check_step(recipe, spec, mesh, length=length):
                first_ranks.setdefault(finding, rank)
    return first_ranks


def check_step(recipe: Training, spec: RunSpec, mesh: Mesh | None, *, length: int) -> list[Finding]:
    """Build a rank of a run on fake tensors of a GPU, and take a step, without compiling it; returns what was found.

    An error of an operation ends the step, and is the last finding.

    Args:
        mesh: of the rank, from `fake_mesh`; None for a single process.
        length: tokens per row.
    """
    recipe = replace(recipe, compile=False)
    precision = build_precision(recipe.precision, recipe.parallel.reduce_dtype)
    dims = ParallelDims() if mesh is None else mesh.dims
    micro_batches = min(recipe.train.accumulation(dims.data_ranks), 2)
    observer = StepObserver(precision.compute or precision.storage, recipe.train.micro_batch_size * length)
    steps = recipe.train.max_steps or TYPICAL_STEPS
    objective = build_objective(recipe, spec, ())
    with fake_cuda(), patch.object(HostEvent, "synchronize", observer.end_copies):
        with DeviceFactories():
            model = build_meta_model(recipe, spec, mesh, DEVICE)
        with fake_tensors(), RoutedRows().applied(), cuda_functions():
            built = leave_scores_ahead(spec)
            state = build_train_state(recipe, built, mesh, DEVICE, resumed=True, steps=steps, meta_model=model)
            if not spec.scores_ahead:
                state.reference = build_reference(state.core, spec, recipe.seed, DEVICE, resumed=True)
            state.timers = ObservedPhases(observer, DEVICE)
            batches = build_batches(recipe, spec, length, micro_batches)
            state.begin_step(0)
            try:
                with observer:
                    train_step(state, batches, objective, max_norm=recipe.train.max_norm)
            except RuntimeError as error:
                if error is not observer.error:
                    raise
    return list(observer.findings)
