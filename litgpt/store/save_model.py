"""Write model folders that transformers loads as they stand, whole or not at all."""

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
from litgpt.model.gpt import GPT
from litgpt.model.names import TensorMapping
from litgpt.model.registry import find_family
from litgpt.store.collectives_io import Group, StageRanks, Warn, get_rank_and_size, print_to_stderr, share_first_message
from litgpt.store.load_model import get_parameter_shapes
from litgpt.store.safetensors_files import write_tensors
from litgpt.store.state_dict import iter_model_tensors
from litgpt.store.tokenizer_files import copy_tokenizer
from litgpt.store.weight_files import SAFETENSORS, SAFETENSORS_INDEX

Tensors = Iterable[tuple[str, Tensor]] | Mapping[str, Tensor]
SHARD_BYTES = 5e9


class ShardWriter:
    """Published tensors gathered into files of at most so many bytes, and the index over them."""

    def __init__(self, folder: Path, shard_bytes: float) -> None:
        self.folder = folder
        self.shard_bytes = shard_bytes
        self.waiting: dict[str, Tensor] = {}
        self.shards: list[list[str]] = []
        self.total = 0

    def add(self, name: str, tensor: Tensor) -> None:
        held = sum(one.nbytes for one in self.waiting.values())
        if self.waiting and held + tensor.nbytes > self.shard_bytes:
            self._flush()
        self.waiting[name] = tensor
        self.total += tensor.nbytes

    def _flush(self) -> None:
        write_tensors(self.folder / f"{len(self.shards)}.safetensors", self.waiting, {"format": "pt"})
        self.shards.append(list(self.waiting))
        self.waiting = {}

    def close(self) -> None:
        """Write what waits, and give the files their names now that their number is known."""
        self._flush()
        if len(self.shards) == 1:
            (self.folder / "0.safetensors").rename(self.folder / SAFETENSORS)
            return
        places: dict[str, str] = {}
        for number, names in enumerate(self.shards):
            shard = f"model-{number + 1:05d}-of-{len(self.shards):05d}.safetensors"
            (self.folder / f"{number}.safetensors").rename(self.folder / shard)
            places |= dict.fromkeys(names, shard)
        write_json(self.folder / SAFETENSORS_INDEX, {"metadata": {"total_size": self.total}, "weight_map": places})


def save_model_folder(
    folder: Path | str,
    *,
    config: Config,
    tensors: Tensors,
    tokenizer_dir: Path | str | None = None,
    dtype: torch.dtype | None = None,
    shard_bytes: float = SHARD_BYTES,
    replace: bool = False,
    warn: Warn = print_to_stderr,
) -> None:
    """Write a model folder whole or not at all, as its published architecture has it, so that transformers loads it.

    Args:
        tensors: every parameter once, under our names.
        tokenizer_dir: a folder whose tokenizer files are copied.
        dtype: cast to this type; None keeps each tensor's own.
        shard_bytes: the size above which the weights are split over files.
        replace: take the place of a folder that exists.
        warn: told if no published architecture has this shape; the folder then keeps our tensor names.

    Raises:
        UserError: if the folder holds something already, or a tensor is missing, unknown or of another shape.
    """
    with staged_folder(Path(folder), replace=replace) as staged:
        write_model_folder(staged, config, tensors, tokenizer_dir=tokenizer_dir, dtype=dtype, shard_bytes=shard_bytes)
        if find_family(config) is None:
            warn(
                f"{folder}: no published architecture has this shape; its tensors keep our names, only litgpt loads it"
            )


def write_model_folder(
    staged: Path,
    config: Config,
    tensors: Tensors,
    *,
    tokenizer_dir: Path | str | None = None,
    dtype: torch.dtype | None = None,
    shard_bytes: float = SHARD_BYTES,
) -> None:
    """Write weights, tokenizer and settings into a staged folder; arguments and errors as in `save_model_folder`."""
    kept = write_weights(staged, config, tensors, dtype=dtype, shard_bytes=shard_bytes)
    special = copy_tokenizer(Path(tokenizer_dir), staged) if tokenizer_dir else {}
    write_settings(staged, config, {"torch_dtype": kept, **special})
    if find_family(config) is not None and not (staged / "generation_config.json").exists():
        write_json(staged / "generation_config.json", {"_from_model_config": True, **special})


def write_weights(
    folder: Path,
    config: Config,
    tensors: Tensors,
    *,
    dtype: torch.dtype | None = None,
    shard_bytes: float = SHARD_BYTES,
) -> str:
    """Write safetensors files into a folder, under published names if there are any; returns their type's name.

    Args as in `save_model_folder`. What a shape keeps in float32 whatever the type of the others is not cast.

    Raises:
        UserError: if a tensor is missing, unknown or of another shape.
    """
    family = find_family(config)
    shapes = get_parameter_shapes(config)
    own = [TensorMapping(name, (name,), "rename") for name in shapes]
    steps = own if family is None else family.tensors.map_names(shapes, config)
    pinned = list_float32_parameters(config)
    writer = ShardWriter(folder, shard_bytes)
    types = set()
    given = tensors.items() if isinstance(tensors, Mapping) else tensors
    cast = ((name, tensor.detach().to("cpu", choose_dtype(name, tensor, dtype, pinned))) for name, tensor in given)
    for name, tensor in joined(steps, cast, shapes, config):
        types.add(tensor.dtype)
        writer.add(name, tensor)
    writer.close()
    most = dtype or (types.pop() if len(types) == 1 else torch.float32)
    return str(most).removeprefix("torch.")


def list_float32_parameters(config: Config) -> set[str]:
    """The parameters of a shape that stay in float32 in a model of any type, such as a router's correction."""
    parameters = GPT.on_meta(config, torch.bfloat16).named_parameters()
    return {name for name, parameter in parameters if parameter.dtype == torch.float32}


def choose_dtype(name: str, tensor: Tensor, dtype: torch.dtype | None, pinned: set[str]) -> torch.dtype:
    """The type that a tensor is written in."""
    return tensor.dtype if dtype is None or name in pinned else dtype


def write_settings(folder: Path, config: Config, more: Mapping[str, Any]) -> None:
    """Write model_config.yaml, and config.json if a published architecture has this shape: what it says, and `more`."""
    (folder / "model_config.yaml").write_text(yaml.safe_dump(config.to_dict()), encoding="utf-8")
    family = find_family(config)
    if family is not None:
        write_json(folder / "config.json", {**family.config_json(config), **more})


def joined(
    steps: list[TensorMapping],
    tensors: Iterable[tuple[str, Tensor]],
    shapes: Mapping[str, tuple[int, ...]],
    config: Config,
) -> Iterator[tuple[str, Tensor]]:
    """Published tensors, each as soon as all of ours that it is made of have come by."""
    steps_of: dict[str, list[TensorMapping]] = {}
    for step in steps:
        for name in step.names:
            steps_of.setdefault(name, []).append(step)
    waiting: dict[str, Tensor] = {}
    missing = set(shapes)
    for name, tensor in tensors:
        if name not in missing:
            raise UserError(f"{name}: not a tensor of this model, or given twice; check model_config.yaml")
        if tuple(tensor.shape) != shapes[name]:
            raise UserError(f"{name}: {list(tensor.shape)} here, {list(shapes[name])} in the model's shape")
        missing.remove(name)
        waiting[name] = tensor
        if all(part in waiting for part in steps_of[name][0].names):
            for step in steps_of[name]:  # one, or one for every expert of a stack
                yield step.hf_name, step.join([waiting[part] for part in step.names], config)
            for part in steps_of[name][0].names:
                del waiting[part]
    if missing:
        raise UserError(
            f"{', '.join(sorted(missing)[:5])}: missing, but the model's shape has it; check model_config.yaml"
        )


def iter_full_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter of a model in full, one at a time; all ranks must iterate together, as shards are gathered."""
    for name, tensor in iter_model_tensors(model):
        yield name, (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


def gather_stages(
    model: nn.Module, tensors: Iterable[tuple[str, Tensor]], *, group: Group = None
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a whole model on the first rank, one at a time; all ranks iterate to the end together.

    Args:
        model: of which each rank may have parts, or a stage.
        tensors: of this rank's stage, in full, which the ranks of a stage gather together one by one.
    """
    return StageRanks((name for name, _ in iter_model_tensors(model)), group).of_all_stages(tensors)


def save_model(
    folder: Path | str,
    model: nn.Module,
    *,
    config: Config,
    tensors: Iterator[tuple[str, Tensor]] | None = None,
    group: Group = None,
    **settings: Any,
) -> None:
    """Write a model folder from a model that may be spread over ranks; all ranks call it, the first one writes.

    No rank holds more at a time than one tensor in full, and the first one file of weights.

    Args:
        model: of which each rank may have parts, or a stage.
        tensors: what is written in place of the model's own, as `gather_stages` takes them.
        settings: as in `save_model_folder`.

    Raises:
        UserError: on every rank, if the first could not write.
    """
    rank, _ = get_rank_and_size(group)
    gathered = gather_stages(model, iter_full_tensors(model) if tensors is None else tensors, group=group)
    error = ""
    if rank == 0:
        try:
            save_model_folder(folder, config=config, tensors=gathered, **settings)
        except (UserError, OSError) as problem:
            error = str(problem)
    for _ in gathered:
        pass  # the other ranks, and a first one that failed, take part in every gathering
    error = share_first_message(error, group)
    if error:
        raise UserError(f"{folder}: not written ({error})")
