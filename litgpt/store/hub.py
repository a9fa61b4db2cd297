"""Download and upload model folders of the Hugging Face hub: weights, settings and tokenizers, no code."""

import fnmatch
import glob
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from hashlib import sha1
from pathlib import Path
from typing import Any

from litgpt.connection import check_hub_connection
from litgpt.errors import UserError
from litgpt.files import CHECKPOINTS, extend_checkpoint_dir, join_inside, sha256
from litgpt.model.config import Config
from litgpt.model.registry import list_model_names, load_families
from litgpt.recipe.object_url import check_client, find_url
from litgpt.store.object_store import get_cache_folder
from litgpt.store.tokenizer_files import MEDIA_FILES

SETTINGS_PATTERNS = ("config.json", "generation_config.json")
TOKENIZER_PATTERNS = (
    "tokenizer*.json",
    "tokenizer*.model",
    "tokenizer*.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template*.json",
    "chat_template*.jinja",
    *MEDIA_FILES,
)
# Only the first line with a match is downloaded; later ones are the same weights in other formats.
WEIGHT_PATTERNS = (
    ("model.safetensors", "model-*.safetensors", "model.safetensors.index.json"),
    ("*.safetensors", "*.safetensors.index.json"),
    ("pytorch_model.bin", "pytorch_model-*.bin", "pytorch_model.bin.index.json"),
)
REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def find_repository(key: str, name: Path) -> str:
    """The org/name on the hub of a model that is no folder here: its name as it is, or that of a known model.

    Raises:
        UserError: naming `key`, if the model has none.
    """
    if REPOSITORY.fullmatch(str(name)) and name.parts[0] != CHECKPOINTS.name:
        return str(name)
    known = (Config.from_name(str(name)).hf_config if str(name) in list_model_names() else None) or {}
    if "org" not in known:
        raise UserError(f"{key}: {name} is not a folder; set a model's folder or its org/name on the hub")
    return f"{known['org']}/{known['name']}"


def find_local_folder(key: str, name: Path) -> Path | None:
    """Find the folder of a model on this machine; None for one that would be downloaded from the hub.

    Args:
        name: a folder, a file in one, one under `checkpoints/`, a URL of an object store, the hub's org/name, or a
            known model's name.

    Raises:
        UserError: naming `key`, if it can be none of these.
    """
    if (path := extend_checkpoint_dir(name)).exists():
        return path
    if url := find_url(name):
        cached = get_cache_folder(url)
        return cached if cached.is_dir() else None
    folder = CHECKPOINTS / find_repository(key, name)
    return folder if folder.is_dir() else None


def check_access(key: str, name: Path) -> None:
    """Check that a model that is no folder here can be downloaded, as far as the hub can be reached.

    Raises:
        UserError: naming `key`, and the folder that the model's files can be put into or the package that is missing.
    """
    if url := find_url(name):
        check_client(key, url)
        return
    target = CHECKPOINTS / find_repository(key, name)
    with raise_one_line(f"{key}: {name} is not a folder here", None, hint=f"or put its files into {target}"):
        check_hub_connection()


def match_patterns(names: Iterable[str], patterns: Iterable[str]) -> list[str]:
    """The names of files at the top of a repository that match any of the patterns."""
    expression = re.compile("|".join(map(fnmatch.translate, patterns)))
    return [name for name in names if "/" not in name and expression.match(name)]


def select_files(names: Iterable[str], *, tokenizer_only: bool) -> list[str]:
    """The files of a repository to download: by an allow list, weights in one format only."""
    names, patterns = sorted(names), SETTINGS_PATTERNS + TOKENIZER_PATTERNS
    if tokenizer_only:
        return match_patterns(names, patterns)
    further = (pattern for family in load_families().values() if family.whole for pattern in family.whole.files)
    chosen = match_patterns(names, [*patterns, *further])
    return chosen + next(filter(None, (match_patterns(names, patterns) for patterns in WEIGHT_PATTERNS)), [])


def download(
    repo_id: str,
    checkpoint_dir: Path,
    *,
    access_token: str | None = None,
    tokenizer_only: bool = False,
    revision: str | None = None,
) -> Path:
    """Download a model into `<checkpoint_dir>/<org>/<name>`, resuming an interrupted download.

    Returns:
        The model's folder.

    Raises:
        UserError: if the repository does not exist, is gated, has no weights, or cannot be reached; or if a file
            differs from what the hub lists.
    """
    from huggingface_hub import HfApi, snapshot_download

    if not REPOSITORY.fullmatch(repo_id) or ".." in repo_id:
        raise UserError(f"repo_id: {repo_id!r} is not org/name, such as EleutherAI/pythia-14m")
    target = checkpoint_dir / repo_id
    with raise_one_line(f"repo_id: {repo_id}", access_token, hint=f"or put the model's files into {target}"):
        check_hub_connection()
        repository = HfApi().model_info(repo_id, revision=revision, token=access_token, files_metadata=True)
        files = {file.rfilename: file for file in repository.siblings or ()}
        names = select_files(files, tokenizer_only=tokenizer_only)
        if not tokenizer_only and not any(name.endswith((".safetensors", ".bin")) for name in names):
            raise UserError(f"repo_id: {repo_id} holds no weights; give one with .safetensors files")
        for name in names:
            join_inside(target, name)
        snapshot_download(
            repo_id,
            revision=repository.sha,  # files of two versions never mix
            token=access_token,
            local_dir=target,
            allow_patterns=[glob.escape(name) for name in names],
        )
        for name in names:
            check_hash(target / name, files[name])
    return target


def check_hash(path: Path, published: Any) -> None:
    """Compare a file with the hash that the hub lists: SHA-256 for large files, git's for others.

    Args:
        published: the hub's entry of the file; without a hash in it, nothing is checked.

    Raises:
        UserError: if they differ; the file is deleted, so that the next download gets it again.
    """
    if published.lfs is not None:
        expected, actual = published.lfs.sha256, sha256(path)
    elif published.blob_id is not None:
        digest = sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
        digest.update(path.read_bytes())
        expected, actual = published.blob_id, digest.hexdigest()
    else:
        return
    if actual != expected:
        path.unlink()
        raise UserError(f"{path}: its bytes are not those that the hub lists; deleted, download again")


def check_repository(key: str, name: str) -> None:
    """Check the name of a repository to upload to; a UserError names `key`, if it is not org/name."""
    if not REPOSITORY.fullmatch(name):
        raise UserError(f"{key}: {name!r} is not org/name, such as me/my-model")


def upload(folder: Path, repo_id: str, *, access_token: str | None = None, message: str | None = None) -> str:
    """Upload a folder to a repository of the hub, created as private if it does not exist; returns its URL.

    Args:
        message: of the commit; None for that of the hub's client.

    Raises:
        UserError: if it cannot be reached, or this account may not write to it.
    """
    from huggingface_hub import HfApi

    with raise_one_line(f"push_to_hub: {repo_id}", access_token, hint=f"the folder {folder} is whole"):
        check_hub_connection()
        api = HfApi(token=access_token)
        api.create_repo(repo_id, private=True, exist_ok=True)
        return str(api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=message))


@contextmanager
def raise_one_line(what: str, access_token: str | None, *, hint: str) -> Iterator[None]:
    """Turn any error of the hub's client into one line that begins with `what`, without the token."""
    from huggingface_hub import errors

    try:
        yield
    except UserError:
        raise
    except errors.OfflineModeIsEnabled:
        raise UserError(f"{what}: HF_HUB_OFFLINE is set, so nothing is fetched; unset it, {hint}") from None
    except errors.GatedRepoError:
        raise UserError(
            f"{what} asks for its licence to be accepted; do so at https://huggingface.co/{what.split()[-1]}, "
            "then set HF_TOKEN"
        ) from None
    except errors.RevisionNotFoundError:
        raise UserError(f"{what} has no such revision; use main or leave it out") from None
    except errors.RepositoryNotFoundError:
        raise UserError(f"{what} is not on the hub, or is private; check the name or set HF_TOKEN") from None
    except Exception as error:  # the client raises its HTTP library's own errors, which differ between versions
        reason = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        reason = reason.replace(access_token, "***") if access_token else reason
        unreachable = isinstance(error, ConnectionError | TimeoutError) or "Connect" in type(error).__name__
        if unreachable:
            raise UserError(f"{what}: the hub cannot be reached ({reason[:200]}); check the network, {hint}") from None
        raise UserError(f"{what} could not be transferred ({reason[:200]}); try again to go on, {hint}") from None
