"""Folders of a cache, named by a hash of everything that their contents depend on."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from litgpt.errors import UserError
from litgpt.files import lock_folder, remove_partial, staged_folder


def hash_key(key: list[Any]) -> str:
    """Hash JSON values to the name of a folder."""
    return hashlib.sha256(json.dumps(key, default=str).encode()).hexdigest()[:20]


def build_once(cache: Path, key: list[Any], build: Callable[[Path], None]) -> Path:
    """Return the folder of `cache` with this key; builds it first if it is missing.

    Two processes may call it at once; the second waits for the first. Files of interrupted processes are removed.

    Args:
        key: everything that the contents depend on, as JSON values.
        build: writes the files into a folder, which is renamed when they are complete.

    Raises:
        UserError: if the cache cannot be written.
    """
    folder = cache / hash_key(key)
    try:
        if not folder.is_dir():
            with lock_folder(cache):
                if not folder.is_dir():
                    remove_partial(cache)
                    with staged_folder(folder) as staged:
                        build(staged)
    except OSError as error:
        where = error.filename or cache
        raise UserError(f"data: {where}: {error.strerror or error}; fix that, or set data.cache_dir") from None
    return folder
