"""Atomic writes of files and folders, checksum manifests, and path joins that cannot leave a folder."""

import codecs
import errno
import hashlib
import json
import os
import shutil
import sys
import tempfile
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from litgpt.errors import UserError
from litgpt.phases import phase

MANIFEST = "manifest.json"
CHECKPOINTS = Path("checkpoints")  # the folder of downloaded models
HASHING_THREADS = 8
# UTF-32 first, since its little-endian mark starts with that of UTF-16
OTHER_ENCODINGS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
"""Encodings by the byte order mark at the start of a file."""


class DamagedFileError(UserError):
    """A file that is missing, truncated or modified; the message names it."""


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_file(path: Path) -> None:
    """Flush a file to disk with fsync."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically: write a temporary file in the same folder, fsync, rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        temporary.write_text(text, encoding="utf-8")
        sync_file(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def find_surrogate(text: str) -> int | None:
    """Find the first character that UTF-8 cannot encode, a lone surrogate; None if there is none."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return error.start
    return None


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically."""
    write_text(path, json.dumps(value, indent=1) + "\n")


class EncodingError(ValueError):
    """Bytes that are not UTF-8.

    Attributes:
        reason: a few words.
        detail: the byte, if it is one that UTF-8 does not have there.
        line: number of the line, from 1.
    """

    def __init__(self, reason: str, detail: str = "", line: int = 1) -> None:
        super().__init__(f"{reason} ({detail})" if detail else reason)
        self.reason, self.detail, self.line = reason, detail, line


def check_encoding(start: bytes) -> None:
    """Check that the first bytes of a file are not the byte order mark of another encoding than UTF-8.

    Raises:
        EncodingError: naming the encoding.
    """
    for mark, encoding in OTHER_ENCODINGS.items():
        if start.startswith(mark):
            raise EncodingError(f"{encoding}, not UTF-8")


def decode_utf8(data: bytes) -> str:
    """Decode text; a byte order mark at its start is not a part of it, and line ends become "\\n".

    Raises:
        EncodingError: if it is not UTF-8.
    """
    check_encoding(data)
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise EncodingError("not UTF-8", f"byte 0x{data[error.start]:02x}", line) from None


def decode_source(data: bytes, source: Path | str) -> str:
    """Decode the text of a file or a URL; a UserError names it and the line, if it is not UTF-8."""
    try:
        return decode_utf8(data)
    except EncodingError as error:
        raise UserError(f"{source}:{error.line}: {error}; convert it to UTF-8") from None


def read_utf8(path: Path) -> str:
    """Read a text file.

    Raises:
        UserError: naming the file, and the line if it is not UTF-8.
    """
    try:
        return decode_source(path.read_bytes(), path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); use an existing file") from None


def parse_yaml(text: str, source: Path | str, loader: Any = yaml.SafeLoader) -> Any:
    """Parse a YAML text; `source` is its name in the UserError of one that is not valid."""
    try:
        return loader(text).get_single_data()
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{source}{line}: not valid YAML ({error.problem})") from None
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{source}: not valid YAML ({' '.join(str(error).split())[:200]})") from None
    except RecursionError:
        raise UserError(f"{source}: nested too deeply") from None


def read_mapping(path: Path, example: str = "n_layer: 6") -> dict[str, Any]:
    """Read a mapping from a YAML or JSON file.

    Args:
        example: a key and its value, for the error.

    Raises:
        UserError: if the file is missing, unreadable, or not a mapping.
    """
    value = parse_yaml(read_utf8(path), path)
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds {type(value).__name__}, not a mapping such as {example!r}")
    return value


def read_json(path: Path) -> Any:
    """Read the JSON value in a file.

    Raises:
        DamagedFileError: if the file is missing or is not valid JSON in UTF-8.
    """
    try:
        return json.loads(decode_utf8(path.read_bytes()))
    except FileNotFoundError:
        raise DamagedFileError(f"{path}: no such file") from None
    except (ValueError, RecursionError) as error:
        raise DamagedFileError(f"{path}: not valid JSON ({error})") from None


def read_json_object(path: Path) -> dict[str, Any]:
    """Read the JSON object in a file; empty if there is no such file, or it contains another value."""
    value = read_json(path) if path.is_file() else {}
    return value if isinstance(value, dict) else {}


def check_writable(path: Path, key: str, *, is_file: bool = False) -> None:
    """Check that a folder (or with `is_file`, a file) can be made at a path and written to; leaves nothing behind.

    Raises:
        UserError: naming the key, the path and the reason.
    """
    folder = path.parent if is_file else path
    try:
        if is_file and path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        existing = next(parent for parent in (folder, *folder.parents) if os.path.lexists(parent))
        with tempfile.TemporaryDirectory(dir=existing, prefix=".litgpt-") as temporary:
            (Path(temporary) / path.relative_to(existing)).mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{key}: {path} cannot be written ({reason}); set another path") from None


def extend_checkpoint_dir(path: Path) -> Path:
    """Return LitGPT's short name of a folder, such as EleutherAI/pythia-14m, as `checkpoints/EleutherAI/pythia-14m`.

    A path that is a folder, or is absolute, or that `checkpoints` does not have, stays as it is.
    """
    is_short = not (path.is_absolute() or path.is_dir() or path.parts[:1] == CHECKPOINTS.parts)
    return CHECKPOINTS / path if is_short and (CHECKPOINTS / path).exists() else path


def publish_folder(staged: Path, final: Path) -> None:
    """Rename a staged folder to its final name, after fsync of all files in it.

    Raises:
        UserError: if `final` exists and is not empty.
    """
    for path in sorted(staged.rglob("*")):
        sync_file(path)
    sync_file(staged)
    check_unused(final)
    staged.rename(final)  # replaces an empty folder atomically
    sync_file(final.parent)


def check_unused(folder: Path) -> None:
    """Raise a UserError if `folder` exists and is not an empty folder."""
    if folder.is_symlink() or (folder.exists() and not (folder.is_dir() and not any(folder.iterdir()))):
        raise UserError(f"{folder} already exists and is not empty; choose another folder or remove it")


@contextmanager
def staged_folder(final: Path, *, replace: bool = False) -> Iterator[Path]:
    """Create a temporary folder beside `final` that is renamed to it on success and removed on an exception.

    Args:
        replace: whether to replace an existing folder, which is deleted only after the rename.

    Raises:
        UserError: if `final` exists and is not empty, unless `replace`.
    """
    if not replace:
        check_unused(final)
    final.parent.mkdir(parents=True, exist_ok=True)
    unique = uuid.uuid4().hex[:8]
    staged, replaced = (final.with_name(f"{final.name}.{unique}.{kind}") for kind in ("partial", "replaced"))
    staged.mkdir()
    try:
        yield staged
        if replace and final.is_dir():
            final.rename(replaced)
        publish_folder(staged, final)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
        if replaced.exists():
            if final.exists():
                shutil.rmtree(replaced, ignore_errors=True)
            else:
                replaced.rename(final)


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Hold the lock of `folder`; the system releases it when the process ends, however it ends."""
    import fcntl

    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with phase(f"waiting for another process that prepares {folder}"):
                fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def remove_partial(folder: Path) -> None:
    """Remove what interrupted runs left in a folder whose lock is held."""
    for leftover in folder.glob("*.partial"):  # no other process writes while the lock is held
        print(f"removing {leftover}, left by a run that was interrupted", file=sys.stderr)
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()


def write_manifest(folder: Path, known: dict[str, str] | None = None) -> None:
    """Write the manifest of a folder: the name, size in bytes and SHA-256 of every file in it.

    Args:
        known: hashes by file name that are already known.
    """
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    entries = {
        name: {"bytes": (folder / name).stat().st_size, "sha256": (known or {}).get(name) or sha256(folder / name)}
        for name in names
        if name != MANIFEST
    }
    write_json(folder / MANIFEST, {"files": entries, "sha256": hash_entries(entries)})


def hash_entries(entries: Any) -> str:
    """Return the SHA-256 of the entries of a manifest, which detects damage to the manifest itself."""
    return hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()


def verify_manifest(folder: Path) -> None:
    """Verify every file of a folder against its manifest.

    Raises:
        DamagedFileError: naming the first file that is missing or whose size or hash differs.
    """
    manifest = read_json(folder / MANIFEST)
    entries = manifest.get("files") if isinstance(manifest, dict) else None
    if not isinstance(entries, dict) or manifest.get("sha256") != hash_entries(entries):
        raise DamagedFileError(f"{folder / MANIFEST}: the manifest is damaged")
    with ThreadPoolExecutor(HASHING_THREADS) as pool:  # hashing releases the GIL
        for _ in pool.map(lambda name: verify_file(join_inside(folder, name), entries[name]), entries):
            pass


def verify_file(path: Path, entry: Any) -> None:
    """Verify one file against its entry in a manifest."""
    if not path.is_file():
        raise DamagedFileError(f"{path}: no such file")
    if path.stat().st_size != entry["bytes"]:
        raise DamagedFileError(f"{path}: {path.stat().st_size} bytes, but the manifest has {entry['bytes']}")
    if sha256(path) != entry["sha256"]:
        raise DamagedFileError(f"{path}: the file is damaged (SHA-256 differs from the manifest)")


def join_inside(folder: Path, name: str) -> Path:
    """Return `folder / name` if it is inside `folder`.

    Raises:
        UserError: if `name` is absolute, contains a NUL, or leads out of `folder` with `..` or a symbolic link.
    """
    if not name or "\0" in name or len(name) > 1024 or Path(name).is_absolute() or "\\" in name or ":" in name:
        raise UserError(f"{folder}: invalid file name {name[:80]!r}; use a name inside the folder")
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"{folder}: invalid file name {name[:80]!r}; it is outside of the folder")
    return path
