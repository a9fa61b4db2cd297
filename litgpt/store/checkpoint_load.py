"""Find a run's checkpoints and restore a model and its optimizers from one, under any layout."""

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from litgpt.errors import UserError
from litgpt.files import MANIFEST, DamagedFileError, read_json, verify_manifest
from litgpt.messages import print_message
from litgpt.phases import phase
from litgpt.store import collectives_io, state_dict
from litgpt.store.collectives_io import StageRanks, Warn, get_rank, share_first_message
from litgpt.store.safetensors_files import SafetensorsFiles, get_shard
from litgpt.store.step_folders import list_checkpoints, no_checkpoint_error

PROGRESS = "progress.json"


def find_damage(folder: Path) -> str | None:
    """Why a checkpoint folder does not verify, naming the file; None if it does."""
    try:
        verify_manifest(folder)
    except (UserError, OSError) as error:
        return str(error)
    return None


def find_latest(out_dir: Path | str, warn: Warn = print_message) -> Path | None:
    """The newest checkpoint of a run that verifies; None without one. Every rank calls it, the first one hashes."""
    latest = ""
    for _, path in list_checkpoints(Path(out_dir)) if get_rank() == 0 else ():
        with phase(f"verifying {path}"):
            damage = find_damage(path)
        if damage is None:
            latest = path.name
            break
        warn(f"{path.name} refused: {damage}; looking for an older checkpoint")
    latest = share_first_message(latest)
    return Path(out_dir) / latest if latest else None


def find_checkpoint(resume: bool | str | Path, out_dir: Path | str, warn: Warn = print_message) -> Path | None:
    """The checkpoint that a recipe's `resume` (false, true, "auto" or a folder) selects; None to start a new run.

    Raises:
        UserError: if `resume` is true and there is none, or the folder is not a checkpoint or is damaged.
    """
    if resume is False or resume is None:
        return None
    if resume is True or resume == "auto":
        folder = find_latest(out_dir, warn)
        if folder is None and resume is True:
            raise no_checkpoint_error(Path(out_dir))
        return folder
    folder, damage = Path(resume), None
    if get_rank() == 0:
        with phase(f"verifying {folder}"):
            damage = find_damage(folder) if folder.is_dir() else f"{folder}: no such folder"
    if error := share_first_message(damage or ""):
        raise UserError(f"resume: {error}; name a step folder of a run, or use resume: auto")
    return folder


def open_checkpoint(folder: Path) -> SafetensorsFiles:
    """The tensors of a checkpoint, read from the files that its manifest names."""
    names = read_json(folder / MANIFEST)["files"]
    shards = sorted(name for name in names if re.fullmatch(r"shard-\d{5}-of-\d{5}\.safetensors", name))
    if not shards:
        raise DamagedFileError(f"{folder}: holds no shard-*.safetensors")
    return SafetensorsFiles(folder / name for name in shards)


def list_unsaved_parts(
    progress: Mapping[str, Any], files: SafetensorsFiles, optimizers: list[Any], *, restore_rng: bool
) -> list[str]:
    """The parts to restore that a checkpoint was saved without, for a message; empty on ranks other than the first."""
    if get_rank() > 0:
        return []
    has_rng = any(name.startswith(state_dict.RNG) for name in files.tensors)
    missing = ["optimizer state (checkpoint.save_optimizer: false)"] if optimizers and not progress["groups"] else []
    return missing + (["random generators (checkpoint.save_rng: false)"] if restore_rng and not has_rng else [])


@torch.no_grad()
def load_checkpoint(
    folder: Path | str,
    model: nn.Module,
    optimizer: state_dict.Optimizers = None,
    *,
    restore_rng: bool = True,
    saved_names: Collection[str] | None = None,
    layout: Mapping[str, int] | None = None,
    warn: Warn = print_message,
) -> dict[str, Any]:
    """Restore a model and its optimizers from a checkpoint, under any layout; returns its progress.

    The folder must be verified (`find_latest` and `find_checkpoint` do that). Every rank reads its own values only.

    Args:
        saved_names: as for `Checkpoints`; the model's other tensors stay as they are.
        layout: degrees of parallelism; random generators are restored only under the layout that saved them.

    Raises:
        UserError: on every rank, if the checkpoint is of another model, precision or optimizer.
    """
    folder, optimizers = Path(folder), state_dict.list_optimizers(optimizer)
    tensors = dict(state_dict.iter_model_tensors(model, saved_names))
    all_names = {name for names in StageRanks(tensors).all_gather_object(list(tensors)) for name in names}
    rank, ranks = get_rank(), collectives_io.get_world_size()
    with phase(f"loading {folder}"), collectives_io.raise_on_all_ranks():
        progress: dict[str, Any] = read_json(folder / PROGRESS)
        files = open_checkpoint(folder)
        state_dict.restore_model(tensors, files, folder.name, all_names)
        if missing := list_unsaved_parts(progress, files, optimizers, restore_rng=restore_rng):
            warn(f"{folder.name}: has no {' and no '.join(missing)}; this begins anew")
        if optimizers and progress["groups"]:
            remote_names = all_names - tensors.keys()
            state_dict.restore_param_groups(model, optimizers, progress["groups"], remote_names)
            state_dict.restore_optimizer(model, optimizers, files, folder.name, remote_names)
        is_same_layout = progress["ranks"] == ranks and progress.get("layout") in (None, layout)
        if restore_rng and is_same_layout:
            state_dict.restore_rng_states(files, rank)
        elif restore_rng and rank == 0:
            warn(
                f"{folder.name}: saved by {progress['ranks']} ranks, loaded by {ranks}"
                f"{' in another layout' if progress['ranks'] == ranks else ''}; random generators are not restored"
            )
    return progress


@torch.no_grad()
def load_reference(folder: Path, model: nn.Module, allocate: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """Load the other values of parameters that a checkpoint holds, under any layout: this rank's shards by name.

    Args:
        allocate: returns a tensor for the values of a shard, given the model's own.

    Raises:
        UserError: on every rank, if the checkpoint has none.
    """
    values = {}
    with phase(f"loading the reference of {folder}"), collectives_io.raise_on_all_ranks():
        files = open_checkpoint(folder)
        saved = {name for name in files.tensors if name.startswith(state_dict.REFERENCE)}
        if not saved:
            raise UserError(f"{folder}: was saved without a reference model; start a new run")
        for name, tensor in state_dict.iter_model_tensors(model):
            if (saved_name := state_dict.REFERENCE + name) in saved:
                shard = get_shard(tensor)
                values[name] = allocate(shard.local)
                files.copy_to(saved_name, replace(shard, local=values[name]))
    return values


def resolve_checkpoint(folder: Path) -> Path | None:
    """The training checkpoint that a folder is, or the newest one in it that verifies; None without one.

    Raises:
        UserError: naming a damaged file, if `folder` itself is a checkpoint that does not verify.
    """
    if (folder / MANIFEST).is_file() or (folder / PROGRESS).is_file():
        verify_manifest(folder)
        return folder
    return find_latest(folder)


def iter_checkpoint_weights(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """The weights in a training checkpoint, in full, one at a time."""
    files = open_checkpoint(folder)
    for name in files.tensors:
        if name.startswith("model."):
            yield name.removeprefix("model."), files.read(name)
