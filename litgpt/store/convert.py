"""Make model folders out of others: staged, read back and held against the source, then put in place by one rename."""

import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from litgpt.errors import UserError
from litgpt.files import read_json, staged_folder, write_json, write_text
from litgpt.model import registry
from litgpt.model.config import Config
from litgpt.model.registry import find_family
from litgpt.store.checkpoint_load import PROGRESS, resolve_checkpoint
from litgpt.store.collectives_io import Warn, print_to_stderr
from litgpt.store.gguf_files import find_gguf
from litgpt.store.gguf_tokenizer import write_tokenizer
from litgpt.store.load_model import iter_tensors, list_published, load_config
from litgpt.store.safetensors_files import iter_byte_blocks
from litgpt.store.save_model import SHARD_BYTES, choose_dtype, list_float32_parameters, write_settings, write_weights
from litgpt.store.tokenizer_files import copy_tokenizer
from litgpt.store.weight_files import SAFETENSORS, SAFETENSORS_INDEX, list_safetensors

Digests = dict[str, tuple[torch.dtype, str]]
STALE_KEYS = ("quantization_config", "dtype")  # of a config.json whose weights are written anew


def hash_tensor(tensor: Tensor) -> str:
    """The SHA-256 of a tensor's values."""
    running = hashlib.sha256()
    for block in iter_byte_blocks(tensor):
        running.update(block)
    return running.hexdigest()


def record_digests(
    tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype | None, pinned: set[str], digests: Digests
) -> Iterator[tuple[str, Tensor]]:
    """The same tensors, cast, after their digests were put down."""
    for name, tensor in tensors:
        cast = tensor.detach().to("cpu", choose_dtype(name, tensor, dtype, pinned))
        digests[name] = (cast.dtype, hash_tensor(cast))
        yield name, cast


def check_written(folder: Path, config: Config, digests: Digests) -> None:
    """Read a folder just written and hold every tensor against what was to be written, to the bit.

    Raises:
        UserError: naming a tensor that came out otherwise, or is missing or too many.
    """
    for name, tensor in iter_tensors(folder, config):
        if digests.pop(name, None) != (tensor.dtype, hash_tensor(tensor)):
            raise UserError(f"{name}: read back, it is not what was to be written; the disk or the table of names errs")
    if digests:
        raise UserError(f"{min(digests)}: not among what was written; the table of names errs")


def rewrite_folder(folder: Path, source: Path, config: Config, *, dtype: torch.dtype | None = None) -> None:
    """Make `folder` a model folder with safetensors, whatever files the weights are in now; its other files stay.

    Args:
        source: the folder or file that holds the weights.
        dtype: cast to this type; None keeps each tensor's own.

    Raises:
        UserError: if the weights are not those of this shape, or read back other than written. Nothing is changed then.
    """
    replaced = {path.name for path in list_safetensors(source)} if source == folder else set()
    with staged_folder(folder, replace=True) as staged:
        if folder.is_dir():
            ignore = shutil.ignore_patterns(*replaced, SAFETENSORS, SAFETENSORS_INDEX)
            shutil.copytree(
                folder, staged, symlinks=True, dirs_exist_ok=True, copy_function=link_or_copy, ignore=ignore
            )
        write_copy(staged, source, config, dtype=dtype)


def export_folder(
    folder: Path, source: Path, config: Config, *, dtype: torch.dtype | None = None, shard_bytes: float = SHARD_BYTES
) -> None:
    """Make a new model folder of the weights and the tokenizer in another.

    Args as in `rewrite`.

    Raises:
        UserError: as `rewrite`, and if `folder` holds something already.
    """
    with staged_folder(folder) as staged:
        write_copy(staged, source, config, dtype=dtype, shard_bytes=shard_bytes)


def write_copy(
    staged: Path,
    source: Path,
    config: Config,
    *,
    dtype: torch.dtype | None = None,
    shard_bytes: float = SHARD_BYTES,
    warn: Warn = print_to_stderr,
) -> None:
    """Write weights, settings and tokenizer of `source` into a staged folder, and read the weights back."""
    digests: Digests = {}
    tensors = record_digests(iter_tensors(source, config, warn=warn), dtype, list_float32_parameters(config), digests)
    kept = write_weights(staged, config, tensors, shard_bytes=shard_bytes)
    special = copy_or_build_tokenizer(source, staged)
    before = read_json(source / "config.json") if (source / "config.json").is_file() else {}
    for name in ("model_config.yaml", "config.json"):
        (staged / name).unlink(missing_ok=True)  # it may be another name of the old file, which stays as it is
    write_settings(staged, config, {"torch_dtype": kept, **special})
    family = find_family(config)
    if family is None:
        warn(f"{source}: no published architecture has this shape; its tensors keep our names, only litgpt loads it")
    elif isinstance(before, dict) and before.get("model_type") == family.model_type:
        told = {key: value for key, value in before.items() if key not in STALE_KEYS}
        write_json(staged / "config.json", {**told, "torch_dtype": kept})
    check_written(staged, config, digests)


def copy_or_build_tokenizer(source: Path, staged: Path) -> dict[str, Any]:
    """Bring a tokenizer to a staged folder, out of a folder or a GGUF file; the numbers of its special tokens."""
    there = any(
        (folder / "tokenizer.json").is_file() or (folder / "tokenizer.model").is_file() for folder in (source, staged)
    )
    path = None if there else find_gguf(source)
    if path is not None:
        write_tokenizer(path, staged)
        return copy_tokenizer(staged, staged)
    return copy_tokenizer(source, staged)


def convert_folder(path: Path, model_name: str | None, dtype: str | None, *, per_tensor: bool = False) -> Path:
    """Convert a folder or a GGUF file to a model folder and return its path.

    Weights that are already in safetensors and need no cast are checked and left as they are; only
    `model_config.yaml` is written next to them.

    Args:
        model_name: a named shape; None reads it from the folder.
        dtype: cast to this type, as torch names it; None keeps each tensor's own.
        per_tensor: print how each tensor is renamed.

    Raises:
        UserError: if the weights do not match the shape. Nothing is changed then.
    """
    source = path if path.is_file() else resolve_checkpoint(path) or path
    folder = path.with_suffix("") if path.suffix == ".gguf" and path.is_file() else source
    config = find_config(source, model_name)
    tensors = list_published(source, config)
    for tensor in tensors if per_tensor else ():
        print(f"{tensor.step.hf_name} -> {', '.join(tensor.step.names)} ({tensor.step.kind})")
    if dtype or folder != source or (folder / PROGRESS).is_file() or not list_safetensors(source):
        rewrite_folder(folder, source, config, dtype=getattr(torch, dtype) if dtype else None)
    else:
        write_text(folder / "model_config.yaml", yaml.safe_dump(config.to_dict()))
    return folder


def find_config(source: Path, model_name: str | None) -> Config:
    """Find the shape of the weights: of the named model, else from the folder's files, else by the folder's name.

    Raises:
        UserError: if none of them gives a shape.
    """
    if model_name:
        return Config.from_name(model_name)
    has_config = any((source / name).is_file() for name in ("model_config.yaml", "config.json")) or find_gguf(source)
    return (
        Config.from_name(source.name)
        if not has_config and source.name in registry.list_model_names()
        else load_config(source)
    )


def link_or_copy(source: str, target: str) -> None:
    """A second name for a file, or a copy where the disk has no such thing."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
