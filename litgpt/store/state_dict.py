"""The tensors of a training run under names that do not depend on its layout, and the optimizer's other settings."""

import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from litgpt.errors import UserError
from litgpt.store.safetensors_files import DTYPE_NAMES, SafetensorsFiles, get_shard

Optimizers = Optimizer | Sequence[Optimizer] | None
WRAPPERS = re.compile(r"(?:^module\.)|(?:^|(?<=\.))(?:_forward_module|_orig_mod|_checkpoint_wrapped_module)\.")


def canonical_name(name: str) -> str:
    """A parameter's name without what DDP, Fabric, `torch.compile` and activation checkpointing put into it."""
    return WRAPPERS.sub("", name)


def list_optimizers(optimizer: Optimizers) -> list[Optimizer]:
    """The optimizers of a run as a list, without Fabric's wrapper."""
    given = [] if optimizer is None else [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer)
    return [getattr(one, "optimizer", one) for one in given]


def iter_model_tensors(model: nn.Module, kept: Collection[str] | None = None) -> Iterator[tuple[str, Tensor]]:
    """The tensors of `iter_all_tensors`, or those of them in `kept`."""
    for name, tensor in iter_all_tensors(model):
        if kept is None or name in kept:
            yield name, tensor


def iter_all_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter (a tied one once) and every persistent buffer of a model, by its plain name."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # after an evaluation the root still holds gathered weights in place of its shards
    for name, parameter in model.named_parameters():
        yield canonical_name(name), parameter
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield canonical_name(f"{prefix}.{name}" if prefix else name), buffer


def iter_optimizer_state(model: nn.Module, optimizers: list[Optimizer]) -> Iterator[tuple[str, Any]]:
    """Every value that the optimizers keep for a parameter, as (`<key>.<parameter>`, tensor or number)."""
    names = {parameter: canonical_name(name) for name, parameter in model.named_parameters()}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                for key, value in optimizer.state.get(parameter, {}).items():
                    if value is not None:
                        yield f"{key}.{names[parameter]}", check_state_value(key, names[parameter], value, parameter)


def check_state_value(key: str, name: str, value: Any, parameter: Tensor) -> Any:
    """`value`, if it is one that can be written and given to any number of ranks."""
    if not isinstance(value, Tensor | bool | int | float):
        raise UserError(f"optimizer state {key!r} of {name} is a {type(value).__name__}; only tensors and numbers save")
    if isinstance(parameter, DTensor) and isinstance(value, Tensor) and not isinstance(value, DTensor) and value.dim():
        raise UserError(
            f"optimizer state {key!r} of {name} is not sharded like its parameter, so it cannot be saved; "
            "use AdamW, or parallel.data_shard: 1"
        )
    return value


def read_param_groups(model: nn.Module, optimizers: list[Optimizer]) -> list[dict[str, Any]]:
    """Every parameter group's settings and parameter names, as JSON holds them."""
    names = {parameter: canonical_name(name) for name, parameter in model.named_parameters()}
    groups = []
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            settings = {
                key: value.item() if isinstance(value, Tensor) else value
                for key, value in group.items()
                if key != "params" and isinstance(value, Tensor | bool | int | float | str | tuple | list | None)
            }
            groups.append(
                {
                    "optimizer": type(optimizer).__name__,
                    "settings": settings,
                    "parameters": [names[parameter] for parameter in group["params"]],
                }
            )
    return groups


def merge_param_groups(of_stages: Iterable[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The parameter groups of a whole model out of those of its stages: groups of one kind and settings are one."""
    merged: dict[str, dict[str, Any]] = {}
    for group in (group for groups in of_stages for group in groups):
        key = json.dumps([group["optimizer"], group["settings"]], sort_keys=True)
        one = merged.setdefault(key, {**group, "parameters": []})
        one["parameters"] = list(dict.fromkeys([*one["parameters"], *group["parameters"]]))
    return list(merged.values())


def restore_param_groups(
    model: nn.Module, optimizers: list[Optimizer], saved: list[dict[str, Any]], elsewhere: Collection[str] = ()
) -> None:
    """Give every parameter group the settings that its parameters were saved with.

    Args:
        elsewhere: parameters that only other ranks have.

    Raises:
        UserError: if the saved groups are of another optimizer or hold other parameters.
    """
    now = read_param_groups(model, optimizers)
    of = {name: number for number, group in enumerate(saved) for name in group["parameters"]}
    here = {name for group in now for name in group["parameters"]}
    kinds, saved_kinds = ({group["optimizer"] for group in groups} for groups in (now, saved))
    if kinds - saved_kinds or (not elsewhere and saved_kinds - kinds):
        raise UserError(
            f"optimizer: the checkpoint was saved with {sorted(saved_kinds)}, this run has {sorted(kinds)}; "
            "use the same"
        )
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    for group, have in zip(groups, now, strict=True):
        numbers = {of.get(name, -1) for name in have["parameters"]}
        number = numbers.pop() if len(numbers) == 1 else -1
        if number < 0 or saved[number]["optimizer"] != have["optimizer"] or of.keys() - here - set(elsewhere):
            raise UserError("optimizer: the checkpoint groups the parameters in another way; use the same optimizer")
        for key, value in saved[number]["settings"].items():
            old = group.get(key)
            if isinstance(old, Tensor):
                old.fill_(value)
            else:
                group[key] = tuple(value) if isinstance(value, list) else value


def check_names(
    what: str, files: SafetensorsFiles, prefix: str, expected: dict[str, Tensor], everyones: Collection[str]
) -> None:
    """Hold the names, shapes and types that a checkpoint has under `prefix` against those that are needed."""
    saved = {name.removeprefix(prefix) for name in files.wholes if name.startswith(prefix)}
    for kind, names in (("lacks", set(everyones) - saved), ("has unknown", saved - set(everyones))):
        if names:
            some = ", ".join(sorted(names)[:5]) + (" ..." if len(names) > 5 else "")
            raise UserError(f"{what}: the checkpoint {kind} {len(names)} tensor(s): {some}")
    for name, tensor in expected.items():
        whole = files.wholes[prefix + name]
        if (whole.shape, whole.dtype) != (tuple(tensor.shape), tensor.dtype):
            raise UserError(
                f"{what}: {name} was saved as {DTYPE_NAMES[whole.dtype]} {list(whole.shape)}, "
                f"here it is {DTYPE_NAMES[tensor.dtype]} {list(tensor.shape)}; use the same model and precision"
            )


def restore_model(tensors: dict[str, Tensor], files: SafetensorsFiles, what: str, everyones: Collection[str]) -> None:
    """Fill this rank's tensors of a model from a checkpoint, each with its own part.

    Args:
        everyones: the names of all ranks' tensors.

    Raises:
        UserError: naming tensors that only one side has, or that differ in shape or type.
    """
    check_names(what, files, "model.", tensors, everyones)
    for name, tensor in tensors.items():
        files.fill(f"model.{name}", get_shard(tensor))


def restore_optimizer(
    model: nn.Module, optimizers: list[Optimizer], files: SafetensorsFiles, what: str, elsewhere: Collection[str] = ()
) -> None:
    """Build the state of fresh optimizers from a checkpoint, each tensor laid out as its parameter is.

    Args:
        elsewhere: parameters that only other ranks have.

    Raises:
        UserError: if the checkpoint has state for parameters that the optimizers do not hold.
    """
    by_parameter: dict[str, list[str]] = {}
    parameters = {canonical_name(name): parameter for name, parameter in model.named_parameters()}
    for name in files.wholes:
        if name.startswith("optimizer."):
            by_parameter.setdefault(name.split(".", 2)[2], []).append(name)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            held = {id(parameter) for parameter in group["params"]}
            mine = [name for name, parameter in parameters.items() if id(parameter) in held]
            for name in mine:
                optimizer.state[parameters[name]] = {
                    full.split(".", 2)[1]: restore_state_value(files, full, parameters[name], group)
                    for full in by_parameter.pop(name, [])
                }
    if unused := by_parameter.keys() - set(elsewhere):
        raise UserError(
            f"{what}: holds optimizer state of {', '.join(sorted(unused)[:5])}, which this run does not train"
        )


def restore_state_value(files: SafetensorsFiles, name: str, parameter: Tensor, group: dict[str, Any]) -> Any:
    """One value of a parameter's optimizer state, on the parameter's device and in its layout."""
    whole = files.wholes[name]
    if whole.python:
        return files.whole(name).item()
    if whole.shape == tuple(parameter.shape) and whole.shape:
        tensor = torch.zeros_like(parameter, dtype=whole.dtype, requires_grad=False)
        files.fill(name, get_shard(tensor))
        return tensor
    # torch keeps step counters on the CPU unless the step itself runs on the device
    counter = not whole.shape and not (group.get("capturable") or group.get("fused"))
    return files.whole(name).to("cpu" if counter else parameter.device, copy=True)


def get_rng_states() -> dict[str, Tensor]:
    """The state of torch's random generators on this rank, as byte tensors."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def restore_rng_states(files: SafetensorsFiles, rank: int) -> None:
    """Put torch's random generators where this rank's were when the checkpoint was taken."""
    setters: dict[str, Callable[[Tensor], None]] = {"cpu": torch.set_rng_state, "cuda": torch.cuda.set_rng_state}
    for kind, setter in setters.items():
        name = f"rng.{rank:05d}.{kind}"
        if name in files.wholes and (kind == "cpu" or torch.cuda.is_available()):
            setter(files.whole(name))


def to_scalar_tensor(number: float) -> Tensor:
    """A Python number as a tensor without dimensions that gives the same number back."""
    return torch.tensor(number, dtype=torch.float64 if isinstance(number, float) else None)


def select_owned(
    tensors: Iterable[tuple[str, Any]], rank: int, ranks: int
) -> Iterator[tuple[str, Tensor, dict[str, Any]]]:
    """What this rank writes: (name, its part, where that lies in the whole tensor).

    Of a sharded tensor every rank of the first replica writes its own part; tensors that `ranks` ranks hold alike are
    dealt out by size.
    """
    alike: list[tuple[str, Tensor, dict[str, Any]]] = []
    for name, value in tensors:
        part = get_shard(value if isinstance(value, Tensor) else to_scalar_tensor(value))
        place: dict[str, Any] = {"shape": list(part.shape), "offset": list(part.offset)}
        if not isinstance(value, Tensor):
            place["python"] = True
        if not part.sharded:
            alike.append((name, part.local, place))
        elif part.first_replica and part.local.numel():
            yield name, part.local, place
    total = sum(tensor.nbytes for _, tensor, _ in alike) or 1
    before = 0
    for name, local, place in alike:
        if min(before * ranks // total, ranks - 1) == rank:
            yield name, local, place
        before += local.nbytes
