"""Write model folders that transformers loads as they are, whole or not at all."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from litgpt.errors import UserError
from litgpt.files import staged_folder, write_json
from litgpt.model.config import Config
from litgpt.model.names import TensorMapping
from litgpt.model.registry import Family, find_family
from litgpt.store.collectives_io import Group, StageRanks, Warn, get_rank_and_size, print_warning, share_first_message
from litgpt.store.published_tensor import list_parameters
from litgpt.store.safetensors_files import write_tensors
from litgpt.store.state_dict import iter_model_tensors
from litgpt.store.tokenizer_files import copy_tokenizer
from litgpt.store.weight_files import SAFETENSORS, SAFETENSORS_INDEX

NamedTensors = Iterable[tuple[str, Tensor]]
SHARD_BYTES = 5e9


class ShardWriter:
    """Writes published tensors into files of at most so many bytes, and the index over them."""

    def __init__(self, folder: Path, shard_bytes: float) -> None:
        self.folder = folder
        self.shard_bytes = shard_bytes
        self.pending: dict[str, Tensor] = {}
        self.shards: list[list[str]] = []
        self.total = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Add a tensor to the shard, which is written first if the tensor does not fit any more."""
        pending_bytes = sum(pending.nbytes for pending in self.pending.values())
        if self.pending and pending_bytes + tensor.nbytes > self.shard_bytes:
            self._flush()
        self.pending[name] = tensor
        self.total += tensor.nbytes

    def _flush(self) -> None:
        write_tensors(self.folder / f"{len(self.shards)}.safetensors", self.pending, {"format": "pt"})
        self.shards.append(list(self.pending))
        self.pending = {}

    def close(self) -> None:
        """Write the last shard, and give the files their names now that their number is known."""
        self._flush()
        if len(self.shards) == 1:
            (self.folder / "0.safetensors").rename(self.folder / SAFETENSORS)
            return
        weight_map: dict[str, str] = {}
        for number, names in enumerate(self.shards):
            shard = f"model-{number + 1:05d}-of-{len(self.shards):05d}.safetensors"
            (self.folder / f"{number}.safetensors").rename(self.folder / shard)
            weight_map |= dict.fromkeys(names, shard)
        write_json(self.folder / SAFETENSORS_INDEX, {"metadata": {"total_size": self.total}, "weight_map": weight_map})


def save_model_folder(
    folder: Path | str,
    *,
    config: Config,
    tensors: NamedTensors | Mapping[str, Tensor],
    tokenizer_dir: Path | str | None = None,
    dtype: torch.dtype | None = None,
    shard_bytes: float = SHARD_BYTES,
    replace: bool = False,
    warn: Warn = print_warning,
) -> None:
    """Write a model folder whole or not at all, as its published architecture has it, so that transformers loads it.

    Args:
        tensors: every parameter once, under our names.
        tokenizer_dir: a folder whose tokenizer files are copied.
        dtype: cast to this type, except what the shape keeps in float32; None keeps each tensor's own.
        shard_bytes: the size above which the weights are split over files.
        replace: replace a folder that exists.
        warn: called if no published architecture has this shape; the folder then keeps our tensor names.

    Raises:
        UserError: if the folder exists and is not empty, or a tensor is missing, unknown or of another shape.
    """
    with staged_folder(Path(folder), replace=replace) as staged:
        settings = {"tokenizer_dir": tokenizer_dir, "dtype": dtype, "shard_bytes": shard_bytes}
        if write_model_folder(staged, config, tensors, **settings) is None:  # type: ignore[arg-type]
            warn(
                f"{folder}: no published architecture has this shape; its tensors keep our names, only litgpt loads it"
            )


def write_model_folder(
    staged: Path,
    config: Config,
    tensors: NamedTensors | Mapping[str, Tensor],
    *,
    tokenizer_dir: Path | str | None = None,
    dtype: torch.dtype | None = None,
    shard_bytes: float = SHARD_BYTES,
) -> Family | None:
    """Write weights, tokenizer and settings into a staged folder; returns the published architecture of this shape.

    Args and errors as in `save_model_folder`.
    """
    family, parameters = find_family(config), list_parameters(config)
    named_tensors = cast_tensors(tensors.items() if isinstance(tensors, Mapping) else tensors, dtype, parameters)
    saved_dtype = write_weights(staged, config, named_tensors, family, parameters, dtype=dtype, shard_bytes=shard_bytes)
    special_tokens = copy_tokenizer(Path(tokenizer_dir), staged) if tokenizer_dir else {}
    write_settings(staged, config, family, {"torch_dtype": saved_dtype, **special_tokens})
    if family is not None and not (staged / "generation_config.json").exists():
        write_json(staged / "generation_config.json", {"_from_model_config": True, **special_tokens})
    return family


def cast_tensors(
    tensors: NamedTensors, dtype: torch.dtype | None, parameters: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """The tensors on the CPU in `dtype`, but for those that a shape keeps in float32 (a router's correction).

    Args:
        dtype: None keeps each tensor's own.
        parameters: those of the shape, as `list_parameters` has them.
    """
    for name, tensor in tensors:
        is_pinned = name in parameters and parameters[name].dtype == torch.float32
        yield name, tensor.detach().to("cpu", tensor.dtype if dtype is None or is_pinned else dtype)


def write_weights(
    folder: Path,
    config: Config,
    tensors: NamedTensors,
    family: Family | None,
    parameters: Mapping[str, Tensor],
    *,
    dtype: torch.dtype | None = None,
    shard_bytes: float = SHARD_BYTES,
) -> str:
    """Write safetensors files into a folder, under the family's names if there is one; returns their type's name.

    Args:
        tensors: every parameter once, under our names, on the CPU.
        parameters: those of the shape, as `list_parameters` has them.
        dtype: the type they were cast to; None to find it.

    Raises:
        UserError: if a tensor is missing, unknown or of another shape.
    """
    if family is None:
        mappings = [TensorMapping(name, (name,), "rename") for name in parameters]
    else:
        mappings = family.tensors.map_names(parameters, config)
    writer = ShardWriter(folder, shard_bytes)
    dtypes = set()
    for hf_name, tensor in join_tensors(mappings, tensors, parameters, config):
        dtypes.add(tensor.dtype)
        writer.add(hf_name, tensor)
    writer.close()
    saved_dtype = dtype or (dtypes.pop() if len(dtypes) == 1 else torch.float32)
    return str(saved_dtype).removeprefix("torch.")


def write_settings(folder: Path, config: Config, family: Family | None, extra: Mapping[str, Any]) -> None:
    """Write model_config.yaml, and the config.json of a published architecture with `extra` keys."""
    (folder / "model_config.yaml").write_text(yaml.safe_dump(config.to_dict()), encoding="utf-8")
    if family is not None:
        write_json(folder / "config.json", {**family.config_json(config), **extra})


def join_tensors(
    mappings: list[TensorMapping], tensors: NamedTensors, parameters: Mapping[str, Tensor], config: Config
) -> Iterator[tuple[str, Tensor]]:
    """Published tensors, each as soon as all of ours that it is made of have been given."""
    mappings_of: dict[str, list[TensorMapping]] = {}
    for mapping in mappings:
        for name in mapping.names:
            mappings_of.setdefault(name, []).append(mapping)
    pending: dict[str, Tensor] = {}
    missing = set(parameters)
    for name, tensor in tensors:
        if name not in missing:
            raise UserError(f"{name}: not a tensor of this model, or given twice; check model_config.yaml")
        if tensor.shape != parameters[name].shape:
            raise UserError(f"{name}: has shape {list(tensor.shape)}, the model's is {list(parameters[name].shape)}")
        missing.remove(name)
        pending[name] = tensor
        names = mappings_of[name][0].names
        if all(part in pending for part in names):
            for mapping in mappings_of[name]:  # one, or one for every expert of a stack
                yield mapping.hf_name, mapping.join([pending[part] for part in mapping.names], config)
            for part in names:
                del pending[part]
    if missing:
        raise UserError(
            f"{', '.join(sorted(missing)[:5])}: missing, but the model's shape has it; check model_config.yaml"
        )


def iter_full_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter of a model in full, one at a time; all ranks must iterate together, as shards are gathered."""
    for name, tensor in iter_model_tensors(model):
        yield name, (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


def gather_stages(model: nn.Module, tensors: NamedTensors, *, group: Group = None) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a whole model on the first rank, one at a time; all ranks iterate to the end together.

    Args:
        model: of which each rank may hold shards, or a stage.
        tensors: of this rank's stage, in full, which the ranks of a stage gather together one by one.
    """
    return StageRanks((name for name, _ in iter_model_tensors(model)), group).gather_tensors(tensors)


def save_model(
    folder: Path | str,
    model: nn.Module,
    *,
    config: Config,
    tensors: Iterator[tuple[str, Tensor]] | None = None,
    group: Group = None,
    **settings: Any,
) -> None:
    """Write a model folder from a model that may be sharded; all ranks call it, the first one writes.

    No rank holds more at a time than one tensor in full, and the first one file of weights.

    Args:
        model: of which each rank may hold shards, or a stage.
        tensors: what is written in place of the model's own, as `gather_stages` takes them.
        settings: as in `save_model_folder`.

    Raises:
        UserError: on every rank, if the first could not write.
    """
    rank, _ = get_rank_and_size(group)
    stage_tensors = gather_stages(model, iter_full_tensors(model) if tensors is None else tensors, group=group)
    error = ""
    if rank == 0:
        try:
            save_model_folder(folder, config=config, tensors=stage_tensors, **settings)
        except (UserError, OSError) as failure:
            error = str(failure)
    for _ in stage_tensors:
        pass  # the other ranks, and a first one that failed, take part in every collective
    error = share_first_message(error, group)
    if error:
        raise UserError(f"{folder}: not written ({error})")
