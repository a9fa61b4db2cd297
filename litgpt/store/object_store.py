"""Training checkpoints and model folders in an object store (s3://, gs://), through fsspec.

A checkpoint is a folder `step-00000008` with the files of the local one. Its `manifest.json` is written last and
deleted first. The stores write an object whole or not at all, and a listing after a write contains it; so a folder
without a manifest, or with a file that the manifest does not describe, was interrupted, and is no checkpoint.
"""

import json
import random
import time
from collections.abc import Callable, Container
from pathlib import Path
from typing import Any, TypeVar

from litgpt.errors import UserError
from litgpt.files import CHECKPOINTS, MANIFEST, hash_entries, join_inside, staged_folder, verify_manifest
from litgpt.phases import phase
from litgpt.recipe.object_url import check_client
from litgpt.store.step_folders import STEP_FOLDER, get_step_folder

ABANDONED = f"{MANIFEST}.abandoned"
"""The manifest of a checkpoint that a run has left behind, because it was resumed from an earlier one."""
MODEL_SUFFIXES = (".json", ".yaml", ".safetensors", ".model", ".txt", ".jinja")
"""The files of a model folder that are downloaded: data, no code and no pickles."""
ATTEMPTS = 6
FIRST_WAIT = 1.0  # seconds before the second attempt; then twice as many
FINAL_ERRORS = (PermissionError, FileNotFoundError, UserError)
"""Errors that another attempt would meet again."""
CREDENTIAL_ERRORS = ("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "DefaultCredentialsError")
"""The names of further such errors, those of botocore and google.auth without credentials; neither may be installed."""

Entries = dict[str, dict[str, Any]]
Returned = TypeVar("Returned")


def describe_error(error: Exception) -> str:
    """An error in one line."""
    return error.detail if isinstance(error, UserError) else " ".join(f"{type(error).__name__}: {error}".split())[:200]


def retry(
    action: Callable[[], Returned],
    warn: Callable[[str], None],
    what: str,
    *,
    final_errors: tuple[type[Exception], ...] = FINAL_ERRORS,
) -> Returned:
    """Call an action that fails when the network does, up to `ATTEMPTS` times, with waits that double.

    Args:
        what: the action, for a message after the first failure.
        final_errors: errors that end it at once.

    Raises:
        Exception: that of the last attempt.
    """
    for attempt in range(ATTEMPTS):
        try:
            return action()
        except Exception as error:  # clients raise the errors of their HTTP libraries
            is_final = isinstance(error, final_errors) or type(error).__name__ in CREDENTIAL_ERRORS
            if attempt == ATTEMPTS - 1 or is_final:
                raise
            if attempt == 0:
                warn(f"{what} failed ({describe_error(error)}); it is tried again")
            # not at the same moments as other runs, and without the random numbers of training
            time.sleep(FIRST_WAIT * 2**attempt * random.SystemRandom().uniform(0.75, 1.25))
    raise AssertionError("unreachable")


def connect(url: str) -> Any:
    """The file system of a URL, which lists what is there now."""
    import fsspec

    return fsspec.filesystem(url.partition(":")[0], use_listings_cache=False)


class ObjectStore:
    """The checkpoints of a run in an object store.

    Args:
        url: of the folder of the run.
        file_system: of fsspec; None for that of the URL.
    """

    def __init__(self, url: str, file_system: Any = None) -> None:
        self.url = url
        self.files = file_system or connect(url)
        self.root = self.files._strip_protocol(url)

    def list_sizes(self, folder: str = "") -> dict[str, int]:
        """The size in bytes of each object by its name in the folder of the run, or in one inside it."""
        root = f"{self.root}/{folder}".rstrip("/")
        listed = self.files.find(root, detail=True)
        return {path.removeprefix(f"{root}/"): entry["size"] for path, entry in listed.items()}

    def read_manifest(self, folder: str) -> Entries | None:
        """The entries of the manifest of a folder by file name; None if there is none, or it is damaged."""
        try:
            content = json.loads(self.files.cat_file(f"{self.root}/{folder}/{MANIFEST}"))
        except (FileNotFoundError, ValueError):
            return None
        entries = content.get("files") if isinstance(content, dict) else None
        return entries if isinstance(entries, dict) and content.get("sha256") == hash_entries(entries) else None

    def list_steps(self) -> list[int]:
        """The steps of folders with a manifest, newest first: the checkpoints, unless objects were lost since."""
        names = (name.split("/") for name in self.list_sizes())
        matches = (STEP_FOLDER.fullmatch(parts[0]) for parts in names if len(parts) == 2 and parts[1] == MANIFEST)
        return sorted((int(match[1]) for match in matches if match), reverse=True)

    def is_whole(self, step: int) -> bool:
        """Whether the store holds all files of a checkpoint with the sizes in its manifest."""
        folder = get_step_folder(Path(), step).name
        entries, sizes = self.read_manifest(folder), self.list_sizes(folder)
        return entries is not None and all(sizes.get(name) == entry["bytes"] for name, entry in entries.items())

    def upload(self, folder: Path) -> None:
        """Upload a local checkpoint, in the place of what an upload of this step has left; its manifest is the last.

        A checkpoint that is there already is left as it is.
        """
        manifest = (folder / MANIFEST).read_bytes()
        entries: Entries = json.loads(manifest)["files"]
        if self.read_manifest(folder.name) == entries and self.is_whole(int(folder.name.removeprefix("step-"))):
            return
        self.delete(folder.name)
        target = f"{self.root}/{folder.name}"
        for name in entries:
            self.files.put_file(str(folder / name), f"{target}/{name}")
        self.files.pipe_file(f"{target}/{MANIFEST}", manifest)

    def delete(self, folder: str) -> None:
        """Delete what a folder holds, its manifest first, so that the rest is not taken for a checkpoint."""
        for name in sorted(self.list_sizes(folder), key=lambda name: (name != MANIFEST, name)):
            self.files.rm_file(f"{self.root}/{folder}/{name}")

    def prune(self, keep: int, best_step: int | None) -> None:
        """Delete the checkpoints older than the newest `keep`, except the best one, and interrupted uploads."""
        names = [name.split("/") for name in self.list_sizes()]
        marked = {parts[0] for parts in names if len(parts) == 2 and parts[1] in (MANIFEST, ABANDONED)}
        interrupted = {parts[0] for parts in names if len(parts) > 1 and STEP_FOLDER.fullmatch(parts[0])} - marked
        old = {get_step_folder(Path(), step).name for step in self.list_steps()[keep:] if step != best_step}
        for folder in sorted(old | interrupted):
            self.delete(folder)

    def abandon_after(self, step: int, own_steps: Container[int]) -> list[int]:
        """Mark the checkpoints after `step`, except a run's own, as those of a past that it has left; returns them."""
        abandoned = [later for later in self.list_steps() if later > step and later not in own_steps]
        for later in abandoned:
            folder = f"{self.root}/{get_step_folder(Path(), later).name}"
            self.files.mv(f"{folder}/{MANIFEST}", f"{folder}/{ABANDONED}")
        return abandoned

    def download_latest(self, out_dir: Path, warn: Callable[[str], None], *, after: int = -1) -> Path | None:
        """Download the newest checkpoint after step `after` that is whole; returns its folder in `out_dir`.

        A local folder of this step, which is damaged, is replaced.
        """
        for step in self.list_steps():
            if step <= after:
                return None
            folder = get_step_folder(out_dir, step)
            if not self.is_whole(step):
                warn(f"{self.url}/{folder.name}: files are missing or have other sizes; looking for an older one")
                continue
            try:
                with phase(f"downloading {self.url}/{folder.name}"), staged_folder(folder, replace=True) as staged:
                    self.download(folder.name, staged, (*(self.read_manifest(folder.name) or {}), MANIFEST))
                    verify_manifest(staged)
            except UserError as error:
                warn(f"{self.url}/{folder.name} refused: {error.detail}; looking for an older one")
                continue
            return folder
        return None

    def download(self, folder: str, target: Path, names: tuple[str, ...]) -> None:
        """Download objects of a folder in the store into a local one."""
        for name in names:
            path = join_inside(target, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            self.files.get_file("/".join(filter(None, (self.root, folder, name))), str(path))


def get_cache_folder(url: str) -> Path:
    """The local folder of a model in an object store: `checkpoints/s3/bucket/model` for s3://bucket/model."""
    return join_inside(CHECKPOINTS, url.replace("://", "/"))


def download_model(key: str, url: str, warn: Callable[[str], None]) -> Path:
    """Download a model folder, whole or not at all, unless it was before; returns the local folder.

    Raises:
        UserError: naming `key`, if it is not there or cannot be downloaded.
    """
    folder = get_cache_folder(url)
    if folder.is_dir():
        return folder
    check_client(key, url)

    def download() -> None:
        store = ObjectStore(url)
        listed = store.list_sizes()
        is_checkpoint = MANIFEST in listed  # which may have files in subfolders
        names = tuple(n for n in listed if n.endswith(MODEL_SUFFIXES) and (is_checkpoint or "/" not in n))
        if not any(name.endswith(".safetensors") for name in names):
            raise UserError(f"{key}: {url} holds no .safetensors files; give the folder of a model, or of a checkpoint")
        with phase(f"downloading {url}"), staged_folder(folder) as staged:
            store.download("", staged, names)
            if is_checkpoint:
                verify_manifest(staged)

    try:
        retry(download, warn, f"downloading {url}")
    except UserError:
        raise
    except Exception as error:
        reason = describe_error(error)
        raise UserError(f"{key}: {url} cannot be downloaded ({reason}); check the URL and your credentials") from None
    return folder
