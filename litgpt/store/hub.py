"""Download model folders from the Hugging Face hub: weights, settings and tokenizer, nothing that could run."""

import fnmatch
import glob
import re
from collections.abc import Iterable
from pathlib import Path

from litgpt.errors import UserError
from litgpt.files import inside

SETTINGS = ("config.json", "generation_config.json")
TOKENIZER = (
    "tokenizer*.json",
    "tokenizer*.model",
    "tokenizer*.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template*.json",
    "chat_template*.jinja",
)
# The first line that fits takes all; later ones hold the same weights again.
WEIGHTS = (
    ("model.safetensors", "model-*.safetensors", "model.safetensors.index.json"),
    ("*.safetensors", "*.safetensors.index.json"),
    ("pytorch_model.bin", "pytorch_model-*.bin", "pytorch_model.bin.index.json"),
)
REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def fitting(names: Iterable[str], patterns: Iterable[str]) -> list[str]:
    """The names, of files at the top of a repository only, that fit any of the patterns."""
    patterns = tuple(patterns)
    return [name for name in names if "/" not in name and any(fnmatch.fnmatchcase(name, one) for one in patterns)]


def wanted(names: Iterable[str], *, tokenizer_only: bool) -> list[str]:
    """The files to download out of those that a repository holds: by an allow list, weights in one form only."""
    names = sorted(names)
    chosen = fitting(names, SETTINGS + TOKENIZER)
    if not tokenizer_only:
        chosen += next(filter(None, (fitting(names, patterns) for patterns in WEIGHTS)), [])
    return chosen


def download(
    repo_id: str,
    checkpoint_dir: Path,
    *,
    access_token: str | None = None,
    tokenizer_only: bool = False,
    revision: str | None = None,
) -> Path:
    """Fetch a model into `<checkpoint_dir>/<org>/<name>`, going on where an interrupted download stopped.

    Returns:
        The model's folder.

    Raises:
        UserError: if the repository is not there, asks for a licence, holds no weights, or cannot be reached.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    if not REPOSITORY.fullmatch(repo_id) or ".." in repo_id:
        raise UserError(f"repo_id: {repo_id!r} is not org/name, such as EleutherAI/pythia-14m")
    target = checkpoint_dir / repo_id
    try:
        repository = HfApi().model_info(repo_id, revision=revision, token=access_token)
        names = wanted((file.rfilename for file in repository.siblings or ()), tokenizer_only=tokenizer_only)
        if not tokenizer_only and not any(name.endswith((".safetensors", ".bin")) for name in names):
            raise UserError(f"repo_id: {repo_id} holds no weights; give one with .safetensors files, or tokenizer_only")
        for name in names:
            inside(target, name)
        patterns = [glob.escape(name) for name in names]
        # by commit, so that files of two versions never mix
        snapshot_download(
            repo_id, revision=repository.sha, token=access_token, local_dir=target, allow_patterns=patterns
        )
    except UserError:
        raise
    except GatedRepoError:
        raise UserError(
            f"repo_id: {repo_id} asks for its licence to be accepted; do so at https://huggingface.co/{repo_id}, "
            "then set HF_TOKEN or give --access_token"
        ) from None
    except RepositoryNotFoundError:
        raise UserError(
            f"repo_id: {repo_id} is not on the hub, or is private; check the name or set HF_TOKEN"
        ) from None
    except RevisionNotFoundError:
        raise UserError(f"revision: {revision!r} is not in {repo_id}; use main or leave it out") from None
    except Exception as error:  # the client raises its HTTP library's own errors, which differ between versions
        reason = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        reason = reason.replace(access_token, "***") if access_token else reason
        raise UserError(f"repo_id: {repo_id} could not be downloaded ({reason[:200]}); try again to go on") from None
    return target
