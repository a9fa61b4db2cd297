"""Find a run's checkpoints and bring a model and its optimizers to where one was taken, under any layout."""

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
    print_to_stderr,
    raise_on_all_ranks,
    share_first_message,
)
from litgpt.store.safetensors_files import SafetensorsFiles
from litgpt.store.state_dict import (
    Optimizers,
    iter_model_tensors,
    list_optimizers,
    restore_model,
    restore_optimizer,
    restore_param_groups,
    restore_rng_states,
)

STEP = re.compile(r"step-(\d+)")
PROGRESS = "progress.json"


def list_checkpoints(out_dir: Path) -> list[tuple[int, Path]]:
    """The finished checkpoint folders of a run with their steps, newest first."""
    found = [(STEP.fullmatch(path.name), path) for path in out_dir.glob("step-*") if path.is_dir()]
    return sorted(((int(match[1]), path) for match, path in found if match), reverse=True)


def refusal(folder: Path) -> str | None:
    """Why a checkpoint folder cannot be trusted, naming the file; None if it can."""
    try:
        verify_manifest(folder)
    except (UserError, OSError) as error:
        return str(error)
    return None


def newest_that_verifies(out_dir: Path, warn: Warn) -> int:
    """The step of the newest checkpoint whose every file is as it was written; -1 if there is none."""
    for step, path in list_checkpoints(out_dir):
        reason = refusal(path)
        if reason is None:
            return step
        warn(f"{path.name} refused: {reason}; looking for an older checkpoint")
    return -1


def find_latest(out_dir: Path | str, warn: Warn = print_to_stderr, *, group: Group = None) -> Path | None:
    """The newest checkpoint of a run that verifies, None without one; every rank calls it, the first one hashes."""
    rank, _ = get_rank_and_size(group)
    mine = newest_that_verifies(Path(out_dir), warn) if rank == 0 else -1
    step = int(share_first_message(str(mine) if rank == 0 else "", group))
    return dict(list_checkpoints(Path(out_dir)))[step] if step >= 0 else None


def find_checkpoint(
    resume: bool | str | Path, out_dir: Path | str, warn: Warn = print_to_stderr, *, group: Group = None
) -> Path | None:
    """The checkpoint that a recipe's `resume` asks for: false, true, "auto", or a folder. None: start afresh.

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
    reason = None
    if rank == 0:
        reason = refusal(folder) if folder.is_dir() else f"{folder}: no such folder"
    error = share_first_message(reason or "", group)
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
    kept: Collection[str] | None = None,
    layout: Mapping[str, int] | None = None,
    group: Group = None,
    warn: Warn = print_to_stderr,
) -> dict[str, Any]:
    """Bring a model and its optimizers to where a checkpoint was taken, under any layout; returns its progress.

    The folder must be verified (`find_latest` and `find_checkpoint` do that). Every rank reads its own values only.

    Args:
        kept: as `Checkpoints` was given; the model's other tensors stay as they are.
        layout: how ranks share work, by which each finds the random generators of the one that did the same.

    Raises:
        UserError: on every rank, if the checkpoint is of another model, precision or optimizer.
    """
    folder = Path(folder)
    optimizers = list_optimizers(optimizer)
    tensors = dict(iter_model_tensors(model, kept))
    peers = StageRanks(tensors, group)
    everyones = {name for names in peers.told(list(tensors)) for name in names}
    rank, ranks = get_rank_and_size(group)
    with raise_on_all_ranks(group):
        progress: dict[str, Any] = read_json(folder / PROGRESS)
        files = open_checkpoint(folder)
        restore_model(tensors, files, folder.name, everyones)
        if optimizers:
            elsewhere = everyones - tensors.keys()
            restore_param_groups(model, optimizers, progress["groups"], elsewhere)
            restore_optimizer(model, optimizers, files, folder.name, elsewhere)
        same = progress["ranks"] == ranks and progress.get("layout") in (None, layout)
        if restore_rng and same:
            restore_rng_states(files, rank)
        elif restore_rng and rank == 0:
            warn(
                f"{folder.name}: saved by {progress['ranks']} ranks, loaded by {ranks}"
                f"{' in another layout' if progress['ranks'] == ranks else ''}; random generators start afresh"
            )
    return progress


def resolve_checkpoint(folder: Path) -> Path | None:
    """The training checkpoint that a folder is, or the newest good one in it; None if it is of another kind.

    Raises:
        UserError: naming a damaged file, if `folder` itself is a checkpoint that does not verify.
    """
    if (folder / MANIFEST).is_file() or (folder / PROGRESS).is_file():
        verify_manifest(folder)
        return folder
    return find_latest(folder)


def iter_checkpoint_weights(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """The weights in a training checkpoint, whole, one at a time."""
    files = open_checkpoint(folder)
    for name in files.wholes:
        if name.startswith("model."):
            yield name.removeprefix("model."), files.whole(name)
