"""The checkpoints of a run: what they hold besides tensors, and how a run is restored from one."""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from litgpt import adapt
from litgpt.recipe.to_yaml import dump_recipe
from litgpt.recipe.training import Training
from litgpt.store.checkpoint_load import load_checkpoint
from litgpt.store.checkpoint_save import Checkpoints
from litgpt.store.tokenizer_files import find_tokenizer_files
from litgpt.train.initial_weights import restore_quantized_base, resume_reference
from litgpt.train.run_spec import RunSpec
from litgpt.train.train_state import TrainState


def list_options(spec: RunSpec, train_state: TrainState, notify: Callable[[str], None]) -> dict[str, Any]:
    """The arguments that saving and loading have in common."""
    names = set(adapt.get_adapter_parameters(train_state.core)) if spec.adapted else None  # all others are frozen
    layout = {} if train_state.mesh is None else asdict(train_state.mesh.dims)
    return {"saved_names": names, "layout": layout, "warn": notify}


def restore(
    recipe: Training, spec: RunSpec, train_state: TrainState, folder: Path, notify: Callable[[str], None]
) -> dict[str, Any]:
    """Restore the model, its optimizers and its reference from a verified checkpoint; returns the progress.

    Raises:
        UserError: on every rank, if the checkpoint is of another model, precision or optimizer.
    """
    model, settings = train_state.core, recipe.checkpoint
    optimizers = train_state.optimizers if settings.load_optimizer else None
    options = list_options(spec, train_state, notify)
    progress = load_checkpoint(folder, model, optimizers, restore_rng=settings.load_rng, **options)
    train_state.load_files(folder)
    if not spec.scores_ahead:
        train_state.reference = resume_reference(model, spec, folder)
    restore_quantized_base(model, spec, train_state.device)
    return progress


def open_checkpoints(
    recipe: Training,
    spec: RunSpec,
    train_state: TrainState,
    *,
    resumed_step: int | None,
    notify: Callable[[str], None],
    out_dir: Path | None = None,
) -> Checkpoints:
    """Open the checkpoints of a run in a folder, `out_dir` of the recipe by default."""
    reference = {} if train_state.reference is None or spec.scores_ahead else train_state.reference.values
    names = ("keep", "asynchronous", "on_error", "save_rng", "save_optimizer")
    kept = {name: getattr(recipe.checkpoint, name) for name in names}
    options = list_options(spec, train_state, notify) | {"reference": reference, "resumed_step": resumed_step}
    return Checkpoints(out_dir or recipe.out_dir, **kept, **options)


def list_checkpoint_files(
    recipe: Training,
    spec: RunSpec,
    train_state: TrainState,
    tokenizer_dir: Path | None,
    prompt_files: Mapping[str, str] | None,
) -> dict[str, str | Path]:
    """The files of a checkpoint besides its tensors and the progress, by name: their text, or a path to copy.

    Args:
        prompt_files: the files of the prompt format of the data; None for that of the tokenizer.
    """
    files: dict[str, str | Path] = {
        "recipe.yaml": dump_recipe(recipe),
        "model_config.yaml": yaml.safe_dump(spec.config.to_dict()),
    }
    if tokenizer_dir:
        files |= find_tokenizer_files(tokenizer_dir, with_format=prompt_files is None)
    return {**files, **(prompt_files or {}), **spec.adapter_files(), **train_state.checkpoint_files()}
