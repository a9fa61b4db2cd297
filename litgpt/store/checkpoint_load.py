"""Find a run's checkpoints and restore a model and its optimizers from one, under any layout."""

import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from litgpt.errors import UserError
from litgpt.files import MANIFEST, DamagedFileError, read_json, verify_manifest
from litgpt.store.collectives_io import (
    Group,
    StageRanks,
    Warn,
    get_rank_and_size,
    print_warning,
    raise_on_all_ranks,
    share_first_message,
)
from litgpt.store.optimizer_state import Optimizers, list_optimizers, restore_optimizer, restore_param_groups
from litgpt.store.safetensors_files import SafetensorsFiles
from litgpt.store.state_dict import iter_model_tensors, restore_model, restore_rng_states

STEP_FOLDER = re.compile(r"step-(\d+)")
PROGRESS = "progress.json"


def list_checkpoints(out_dir: Path) -> list[tuple[int, Path]]:
    """The finished checkpoint folders of a run with their steps, newest first."""
    matches = [(STEP_FOLDER.fullmatch(path.name), path) for path in out_dir.glob("step-*") if path.is_dir()]
    return sorted(((int(match[1]), path) for match, path in matches if match), reverse=True)


def find_damage(folder: Path) -> str | None:
    """Why a checkpoint folder does not verify, naming the file; None if it does."""
    try:
        verify_manifest(folder)
    except (UserError, OSError) as error:
        return str(error)
    return None


def find_latest(out_dir: Path | str, warn: Warn = print_warning, *, group: Group = None) -> Path | None:
    """The newest checkpoint of a run that verifies, None without one; every rank calls it, the first one hashes."""
    rank, _ = get_rank_and_size(group)
    step = find_latest_step(Path(out_dir), warn) if rank == 0 else -1
    step = int(share_first_message(str(step) if rank == 0 else "", group))
    return dict(list_checkpoints(Path(out_dir)))[step] if step >= 0 else None


def find_latest_step(out_dir: Path, warn: Warn) -> int:
    """The step of the newest checkpoint whose every file is as it was written; -1 if there is none."""
    for step, path in list_checkpoints(out_dir):
        damage = find_damage(path)
        if damage is None:
            return step
        warn(f"{path.name} refused: {damage}; looking for an older checkpoint")
    return -1


def find_checkpoint(
    resume: bool | str | Path, out_dir: Path | str, warn: Warn = print_warning, *, group: Group = None
) -> Path | None:
    """The checkpoint of a recipe's `resume`: false, true, "auto", or a folder. None: start a new run.

    Raises:
        UserError: if `resume` is true and there is none, or the folder is not a checkpoint or is damaged.
    """
    if resume is False or resume is None:
        return None
    if resume is True or resume == "auto":
        folder = find_latest(out_dir, warn, group=group)
        if folder is None and resume is True:
            raise UserError(f"resume: true, but {out_dir} holds no checkpoint; use resume: auto to start without one")
        return folder
    folder = Path(resume)
    rank, _ = get_rank_and_size(group)
    damage = None
    if rank == 0:
        damage = find_damage(folder) if folder.is_dir() else f"{folder}: no such folder"
    error = share_first_message(damage or "", group)
    if error:
        raise UserError(f"resume: {error}; name a step folder of a run, or use resume: auto")
    return folder


def open_checkpoint(folder: Path) -> SafetensorsFiles:
    """The tensors of a checkpoint, read from the files that its manifest names."""
    names = read_json(folder / MANIFEST)["files"]
    shards = sorted(name for name in names if re.fullmatch(r"shard-\d{5}-of-\d{5}\.safetensors", name))
    if not shards:
        raise DamagedFileError(f"{folder}: holds no shard-*.safetensors")
    return SafetensorsFiles(folder / name for name in shards)


@torch.no_grad()
def load_checkpoint(
    folder: Path | str,
    model: nn.Module,
    optimizer: Optimizers = None,
    *,
    restore_rng: bool = True,
    saved_names: Collection[str] | None = None,
    layout: Mapping[str, int] | None = None,
    group: Group = None,
    warn: Warn = print_warning,
) -> dict[str, Any]:
    """Restore a model and its optimizers from a checkpoint, under any layout; returns its progress.

    The folder must be verified (`find_latest` and `find_checkpoint` do that). Every rank reads its own values only.

    Args:
        saved_names: as for `Checkpoints`; the model's other tensors stay as they are.
        layout: degrees of parallelism; random generators are restored only under the layout that saved them.

    Raises:
        UserError: on every rank, if the checkpoint is of another model, precision or optimizer.
    """
    folder = Path(folder)
    optimizers = list_optimizers(optimizer)
    tensors = dict(iter_model_tensors(model, saved_names))
    all_names = {name for names in StageRanks(tensors, group).all_gather_object(list(tensors)) for name in names}
    rank, ranks = get_rank_and_size(group)
    with raise_on_all_ranks(group):
        progress: dict[str, Any] = read_json(folder / PROGRESS)
        files = open_checkpoint(folder)
        restore_model(tensors, files, folder.name, all_names)
        if optimizers:
            remote_names = all_names - tensors.keys()
            restore_param_groups(model, optimizers, progress["groups"], remote_names)
            restore_optimizer(model, optimizers, files, folder.name, remote_names)
        is_same_layout = progress["ranks"] == ranks and progress.get("layout") in (None, layout)
        if restore_rng and is_same_layout:
            restore_rng_states(files, rank)
        elif restore_rng and rank == 0:
            warn(
                f"{folder.name}: saved by {progress['ranks']} ranks, loaded by {ranks}"
                f"{' in another layout' if progress['ranks'] == ranks else ''}; random generators are not restored"
            )
    return progress


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
