"""The tensors of a training run under names that do not depend on its layout: listed, sharded, and restored."""

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from litgpt.errors import UserError
from litgpt.store.safetensors_files import DTYPE_NAMES, SafetensorsFiles, get_shard

WRAPPERS = re.compile(r"(?:^module\.)|(?:^|(?<=\.))(?:_forward_module|_orig_mod|_checkpoint_wrapped_module)\.")


def get_canonical_name(name: str) -> str:
    """A parameter's name without what DDP, Fabric, `torch.compile` and activation checkpointing add to it."""
    return WRAPPERS.sub("", name)


def iter_model_tensors(model: nn.Module, saved_names: Collection[str] | None = None) -> Iterator[tuple[str, Tensor]]:
    """Every parameter (a tied one once) and every persistent buffer of a model, by its canonical name.

    Args:
        saved_names: the names to list; None for all.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # after an evaluation the root still holds unsharded weights in place of its shards
    tensors = [(get_canonical_name(name), parameter) for name, parameter in model.named_parameters()]
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                tensors.append((get_canonical_name(f"{prefix}.{name}" if prefix else name), buffer))
    return ((name, tensor) for name, tensor in tensors if saved_names is None or name in saved_names)


def restore_model(
    tensors: Mapping[str, Tensor], files: SafetensorsFiles, checkpoint: str, all_names: Collection[str]
) -> None:
    """Fill this rank's tensors of a model from a checkpoint, each with its own shard.

    Args:
        checkpoint: its name, for messages.
        all_names: the names of all ranks' tensors.

    Raises:
        UserError: naming tensors that only one side has, or that differ in shape or type.
    """
    prefix = "model."
    saved = {name.removeprefix(prefix) for name in files.tensors if name.startswith(prefix)}
    for verb, names in (("lacks", set(all_names) - saved), ("has unknown", saved - set(all_names))):
        if names:
            listed = ", ".join(sorted(names)[:5]) + (" ..." if len(names) > 5 else "")
            raise UserError(f"{checkpoint}: the checkpoint {verb} {len(names)} tensor(s): {listed}")
    for name, tensor in tensors.items():
        stored = files.tensors[prefix + name]
        if (stored.shape, stored.dtype) != (tuple(tensor.shape), tensor.dtype):
            raise UserError(
                f"{checkpoint}: {name} was saved as {DTYPE_NAMES[stored.dtype]} {list(stored.shape)}, "
                f"in this run it is {DTYPE_NAMES[tensor.dtype]} {list(tensor.shape)}; use the same model and precision"
            )
    for name, tensor in tensors.items():
        files.copy_to(prefix + name, get_shard(tensor))


def get_rng_states() -> dict[str, Tensor]:
    """The state of torch's random generators on this rank, as byte tensors."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def restore_rng_states(files: SafetensorsFiles, rank: int) -> None:
    """Set torch's random generators to this rank's state in the checkpoint."""
    setters: dict[str, Callable[[Tensor], None]] = {"cpu": torch.set_rng_state, "cuda": torch.cuda.set_rng_state}
    for device, setter in setters.items():
        name = f"rng.{rank:05d}.{device}"
        if name in files.tensors and (device == "cpu" or torch.cuda.is_available()):
            setter(files.read(name))


def select_shards(
    tensors: Iterable[tuple[str, Any]], rank: int, ranks: int
) -> Iterator[tuple[str, Tensor, dict[str, Any]]]:
    """What this rank writes: (name, its shard, shape of the full tensor and offset of the shard).

    Of a sharded tensor every rank of the first replica writes its own shard; tensors that are the same on all `ranks`
    are divided among them by size. A Python number is written as a tensor without dimensions.
    """
    replicated: list[tuple[str, Tensor, dict[str, Any]]] = []
    for name, value in tensors:
        is_number = not isinstance(value, Tensor)
        # float64, to give the same Python number back
        tensor = torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else None) if is_number else value
        shard = get_shard(tensor)
        block: dict[str, Any] = {"shape": list(shard.shape), "offset": list(shard.offset)}
        if is_number:
            block["python"] = True
        if not shard.is_sharded:
            replicated.append((name, shard.local, block))
        elif shard.is_first_replica and shard.local.numel():
            yield name, shard.local, block
    total = sum(tensor.nbytes for _, tensor, _ in replicated) or 1
    preceding = 0
    for name, local, block in replicated:
        if min(preceding * ranks // total, ranks - 1) == rank:
            yield name, local, block
        preceding += local.nbytes
