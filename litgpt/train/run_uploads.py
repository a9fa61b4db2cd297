"""Where the checkpoints of a run go besides its folder: an object store to resume from, and the hub, as models."""

import shutil
from collections.abc import Callable
from pathlib import Path

from litgpt.errors import UserError
from litgpt.parallel.strategy import is_rank_zero
from litgpt.recipe.training import Training
from litgpt.store import hub
from litgpt.store.adapters.folder import load_adapter_folder, save_adapter_folder
from litgpt.store.checkpoint_load import find_checkpoint
from litgpt.store.checkpoint_save import Checkpoints
from litgpt.store.collectives_io import Warn, raise_on_all_ranks, share_first_message
from litgpt.store.convert import export_folder
from litgpt.store.object_store import ObjectStore, describe_error, retry
from litgpt.store.step_folders import STEP_FOLDER, no_checkpoint_error
from litgpt.store.uploads import Uploads
from litgpt.train.run_spec import RunSpec


def find_resumed(recipe: Training, warn: Warn) -> Path | None:
    """Find the checkpoint that a run resumes from, in its folder or, if a newer one is there, in its object store.

    Every rank calls it. The newest checkpoint in the store is downloaded into the folder of the run.

    Returns:
        A folder that verifies; None to start a new run.

    Raises:
        UserError: on every rank, if there is none to resume, the store cannot be read, or it holds the checkpoints of
            another run.
    """
    url, resume = recipe.checkpoint.upload_to, recipe.resume
    if url is None:
        return find_checkpoint(resume, recipe.out_dir, warn)
    local = find_checkpoint("auto" if resume is True else resume, recipe.out_dir, warn)
    if isinstance(resume, Path):
        return local
    name = ""
    with raise_on_all_ranks():
        if is_rank_zero():
            name = download_newer(recipe, url, local, warn)
    name = share_first_message(name)
    folder = recipe.out_dir / name if name else local
    if folder is None and resume is True:
        raise no_checkpoint_error(recipe.out_dir)
    return folder


def download_newer(recipe: Training, url: str, local: Path | None, warn: Warn) -> str:
    """Download the newest checkpoint of the store if it is newer than the local one; returns its name, else "".

    Raises:
        UserError: if the store cannot be read, or holds checkpoints although the run is new.
    """
    key = f"checkpoint.upload_to: {url}"
    local_step = step_of(local) if local else -1
    try:
        store = ObjectStore(url)
        steps = retry(store.list_steps, warn, f"listing {url}")
        if steps and not recipe.resume:
            raise UserError(f"{key} holds a run already; set resume: auto to continue it, or another URL")
        if not recipe.resume:
            return ""
        loaded = retry(
            lambda: store.download_latest(recipe.out_dir, warn, after=local_step), warn, f"downloading {url}"
        )
    except UserError:
        raise
    except Exception as error:  # of the client's HTTP library
        raise UserError(f"{key} cannot be read ({describe_error(error)}); check bucket and credentials") from None
    return loaded.name if loaded else ""


def step_of(folder: Path) -> int:
    """The step in the name of a checkpoint's folder; -1 for another name."""
    match = STEP_FOLDER.fullmatch(folder.name)
    return int(match[1]) if match else -1


def open_uploads(
    recipe: Training, spec: RunSpec, checkpoints: Checkpoints, resumed_from: Path | None, warn: Warn
) -> list[Uploads]:
    """Open the destinations of a run's checkpoints, on the first rank; empty on the others and without any.

    A checkpoint that the run has resumed from is uploaded to the store, if it is not there.
    """
    if not is_rank_zero():
        return []
    opened = []
    if url := recipe.checkpoint.upload_to:
        opened.append(Uploads(url, build_store_upload(ObjectStore(url), checkpoints), warn))
        if resumed_from is not None and resumed_from.parent == recipe.out_dir:
            opened[0].add(resumed_from)
    if repository := recipe.checkpoint.push_to_hub:
        token = getattr(recipe, "access_token", None)  # of commands that download a model
        destination = f"{repository} on the hub"
        opened.append(Uploads(destination, lambda folder: push_model(folder, spec, repository, token, warn), warn))
    return opened


def build_store_upload(store: ObjectStore, checkpoints: Checkpoints) -> Callable[[Path], None]:
    """Build the upload of a checkpoint to a store, which then keeps as many as the run does."""
    own_steps: set[int] = set()
    resumed_step = checkpoints.resumed_step or 0

    def upload(folder: Path) -> None:
        for step in store.abandon_after(resumed_step, own_steps):
            checkpoints.warn(f"{store.url}: step {step} is not of this run's past; its manifest is renamed")
        store.upload(folder)
        own_steps.add(step_of(folder))
        store.prune(checkpoints.keep, checkpoints.best_step)

    return lambda folder: retry(lambda: upload(folder), checkpoints.warn, f"{folder.name}: uploading it to {store.url}")


def push_model(folder: Path, spec: RunSpec, repository: str, token: str | None, warn: Warn) -> None:
    """Upload a checkpoint to the hub as a folder that transformers loads, or PEFT if the run trains an adapter.

    Raises:
        UserError: if it cannot be uploaded.
    """
    model = folder.with_name(f"{folder.name}.model.partial")  # which the next start removes, if this process is killed
    try:
        export_checkpoint(model, folder, spec)

        def upload() -> None:
            hub.upload(model, repository, access_token=token, message=f"Step {step_of(folder)}")

        # any error is tried again: the message of the hub's client does not always tell whether the network was lost
        retry(upload, warn, f"{folder.name}: uploading it to {repository} on the hub", final_errors=())
    finally:
        shutil.rmtree(model, ignore_errors=True)


def export_checkpoint(target: Path, folder: Path, spec: RunSpec) -> None:
    """Write the model or adapter of a checkpoint as a new folder."""
    if not spec.adapted:
        export_folder(target, folder, spec.config)
        return
    saved = load_adapter_folder(folder, spec.config)
    save_adapter_folder(
        target,
        saved.tensors,
        config=saved.config,
        settings=saved.settings,
        base=saved.base,
        base_settings=saved.base_settings,
        changes=spec.base_changes,
        tokenizer_dir=folder,
    )
