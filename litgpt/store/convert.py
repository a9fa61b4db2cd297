"""Convert model folders: write to a staged folder, read back and compare with the source, rename into place."""

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
from litgpt.files import check_writable, read_json_object, staged_folder, write_json, write_text
from litgpt.messages import print_message
from litgpt.model import registry
from litgpt.model.config import Config
from litgpt.store.carried_parts import drop_stale_keys
from litgpt.store.checkpoint_load import PROGRESS, resolve_checkpoint
from litgpt.store.gguf_files import find_gguf
from litgpt.store.gguf_tokenizer import write_tokenizer
from litgpt.store.load_model import correct_by_weights, iter_tensors, load_config, load_saved_config
from litgpt.store.megatron_files import find_torch_dist
from litgpt.store.published_tensor import list_parameters
from litgpt.store.safetensors_files import iter_byte_blocks
from litgpt.store.save_model import SHARD_BYTES, UNPUBLISHED, cast_tensors, write_model
from litgpt.store.tensor_audit import list_published
from litgpt.store.tokenizer_files import copy_tokenizer
from litgpt.store.weight_files import SAFETENSORS, SAFETENSORS_INDEX, list_safetensors

Digests = dict[str, tuple[torch.dtype, str]]


def hash_tensor(tensor: Tensor) -> str:
    """The SHA-256 of a tensor's values."""
    sha256 = hashlib.sha256()
    for block in iter_byte_blocks(tensor):
        sha256.update(block)
    return sha256.hexdigest()


def record_digests(tensors: Iterable[tuple[str, Tensor]], digests: Digests) -> Iterator[tuple[str, Tensor]]:
    """Yield the same tensors, after adding the type and hash of each to `digests`."""
    for name, tensor in tensors:
        digests[name] = (tensor.dtype, hash_tensor(tensor))
        yield name, tensor


def check_written(folder: Path, config: Config, digests: Digests) -> None:
    """Read back a folder and compare every tensor with what was written, to the bit.

    Raises:
        UserError: naming a tensor that differs, or is missing or unexpected.
    """
    for name, tensor in iter_tensors(folder, config):
        if digests.pop(name, None) != (tensor.dtype, hash_tensor(tensor)):
            raise UserError(f"{name}: read back, it differs from what was written; check the disk")
    if digests:
        raise UserError(f"{min(digests)}: missing when read back; check the table of names")


def rewrite_folder(folder: Path, source: Path, config: Config, *, dtype: torch.dtype | None = None) -> None:
    """Rewrite a folder as a model folder with safetensors files; files other than weights and settings stay.

    Args:
        source: the folder or file that holds the weights.
        dtype: cast to this type; None keeps the type of each tensor.

    Raises:
        UserError: if the weights do not match the shape, or differ when read back; the folder is then unchanged.
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
    """Write the weights and the tokenizer of a folder to a new model folder.

    Args as in `rewrite_folder` and `save_model_folder`.

    Raises:
        UserError: as `rewrite_folder`, and if `folder` exists and is not empty.
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
) -> None:
    """Write weights, settings and tokenizer of `source` into a staged folder, and read the weights back."""
    digests: Digests = {}
    weights = cast_tensors(iter_tensors(source, config), dtype, list_parameters(config))
    special_tokens = copy_or_build_tokenizer(source, staged)
    tensors = record_digests(weights, digests)
    family, saved_dtype = write_model(staged, config, tensors, special_tokens, source=source, shard_bytes=shard_bytes)
    values = read_json_object(source / "config.json")
    if family is None:
        print_message(f"{source}: {UNPUBLISHED}")
    elif values.get("model_type") == family.model_type:
        written = read_json_object(staged / "config.json")
        values = drop_stale_keys(values)
        values |= {key: written[key] for key in ("tie_word_embeddings",) if key in written}
        write_json(staged / "config.json", {**values, "torch_dtype": saved_dtype})
    check_written(staged, config, digests)


def copy_or_build_tokenizer(source: Path, staged: Path) -> dict[str, Any]:
    """Copy a tokenizer to a staged folder, or build it from a GGUF file; returns the ids of its special tokens."""
    names = ("tokenizer.json", "tokenizer.model")
    has_tokenizer = any((folder / name).is_file() for folder in (source, staged) for name in names)
    if not has_tokenizer and (path := find_gguf(source)):
        write_tokenizer(path, staged)
        source = staged
    return copy_tokenizer(source, staged)


def convert_folder(path: Path, model_name: str | None, dtype: str | None, *, per_tensor: bool = False) -> Path:
    """Convert a folder or a GGUF file to a model folder and return its path.

    Weights that are already in safetensors and need no cast are checked and left as they are; only
    `model_config.yaml` is written next to them.

    Args:
        model_name: a named shape; None reads it from the folder.
        dtype: the name of a torch type to cast to; None keeps the type of each tensor.
        per_tensor: print how each tensor is renamed.

    Raises:
        UserError: if the weights do not match the shape; the folder is then unchanged.
    """
    source = path if path.is_file() else resolve_checkpoint(path) or path
    folder = path.with_suffix("") if path.suffix == ".gguf" and path.is_file() else source
    config = find_config(source, model_name)
    check_writable(folder, "checkpoint_dir")
    tensors = list_published(source, config)
    for tensor in tensors if per_tensor else ():
        print(f"{tensor.hf_name} -> {', '.join(tensor.mapping.names)} ({tensor.mapping.kind})")
    if dtype or folder != source or (folder / PROGRESS).is_file() or not list_safetensors(source):
        rewrite_folder(folder, source, config, dtype=getattr(torch, dtype) if dtype else None)
    else:
        untie_settings(folder, config)
        write_text(folder / "model_config.yaml", yaml.safe_dump(config.to_dict()))
    return folder


def untie_settings(folder: Path, config: Config) -> None:
    """Set in the config.json of a folder that the head of an untied model is not tied, if it says otherwise."""
    values, key = read_json_object(folder / "config.json"), "tie_word_embeddings"
    if not values or config.tie_embeddings:
        return
    if values[key] if key in values else load_saved_config(folder).tie_embeddings:
        write_json(folder / "config.json", {**values, key: False})


def find_config(source: Path, model_name: str | None) -> Config:
    """Find the config of the weights: that of the named model, else from the folder's files, else by its name.

    Raises:
        UserError: if none of them gives a shape.
    """
    has_config = registry.has_config(source) or find_gguf(source) or find_torch_dist(source)
    if not model_name and not has_config and source.name in registry.list_model_names():
        model_name = source.name
    return correct_by_weights(source, Config.from_name(model_name)) if model_name else load_config(source)


def link_or_copy(source: str, target: str) -> None:
    """Make a hard link to a file, or a copy where the file system has no hard links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
