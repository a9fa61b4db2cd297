"""What optimizers keep for the parameters of a run, and the settings of their groups: listed and restored by name."""

import json
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from litgpt.errors import UserError
from litgpt.store.safetensors_files import SafetensorsFiles, get_shard
from litgpt.store.state_dict import get_canonical_name

Optimizers = Optimizer | Sequence[Optimizer] | None


def list_optimizers(optimizer: Optimizers) -> list[Optimizer]:
    """The optimizers of a run as a list, without Fabric's wrapper."""
    optimizers = [] if optimizer is None else [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer)
    return [getattr(wrapped, "optimizer", wrapped) for wrapped in optimizers]


def iter_optimizer_state(model: nn.Module, optimizers: list[Optimizer]) -> Iterator[tuple[str, Any]]:
    """Every value that the optimizers keep for a parameter, as (`<key>.<parameter>`, tensor or number)."""
    names = {parameter: get_canonical_name(name) for name, parameter in model.named_parameters()}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                for key, value in optimizer.state.get(parameter, {}).items():
                    if value is not None:
                        check_state_value(key, names[parameter], value, parameter)
                        yield f"{key}.{names[parameter]}", value


def check_state_value(key: str, name: str, value: Any, parameter: Tensor) -> None:
    """Refuse a value that cannot be written, or cannot be loaded by another number of ranks."""
    if not isinstance(value, Tensor | bool | int | float):
        raise UserError(f"optimizer state {key!r} of {name} is a {type(value).__name__}; only tensors and numbers save")
    if isinstance(parameter, DTensor) and isinstance(value, Tensor) and not isinstance(value, DTensor) and value.dim():
        raise UserError(
            f"optimizer state {key!r} of {name} is not sharded like its parameter, so it cannot be saved; "
            "use AdamW, or parallel.data_shard: 1"
        )


def list_param_groups(model: nn.Module, optimizers: list[Optimizer]) -> list[dict[str, Any]]:
    """Every parameter group's settings and parameter names, as JSON holds them."""
    names = {parameter: get_canonical_name(name) for name, parameter in model.named_parameters()}
    return [
        {
            "optimizer": type(optimizer).__name__,
            "settings": {
                key: value.item() if isinstance(value, Tensor) else value
                for key, value in group.items()
                if key != "params" and isinstance(value, Tensor | bool | int | float | str | tuple | list | None)
            },
            "parameters": [names[parameter] for parameter in group["params"]],
        }
        for optimizer in optimizers
        for group in optimizer.param_groups
    ]


def merge_param_groups(groups_of_stages: Iterable[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The parameter groups of a whole model out of those of its stages: groups of one kind and settings become one."""
    merged: dict[str, dict[str, Any]] = {}
    for group in (group for groups in groups_of_stages for group in groups):
        key = json.dumps([group["optimizer"], group["settings"]], sort_keys=True)
        target = merged.setdefault(key, {**group, "parameters": []})
        target["parameters"] = list(dict.fromkeys([*target["parameters"], *group["parameters"]]))
    return list(merged.values())


def restore_param_groups(
    model: nn.Module, optimizers: list[Optimizer], saved: list[dict[str, Any]], remote_names: Collection[str] = ()
) -> None:
    """Give every parameter group the settings that its parameters were saved with.

    Args:
        remote_names: parameters that only other ranks have.

    Raises:
        UserError: if the saved groups are of another optimizer or hold other parameters.
    """
    current = list_param_groups(model, optimizers)
    saved_in = {name: number for number, group in enumerate(saved) for name in group["parameters"]}
    local_names = {name for group in current for name in group["parameters"]}
    kinds, saved_kinds = ({group["optimizer"] for group in groups} for groups in (current, saved))
    if kinds - saved_kinds or (not remote_names and saved_kinds - kinds):
        raise UserError(
            f"optimizer: the checkpoint was saved with {sorted(saved_kinds)}, this run has {sorted(kinds)}; "
            "use the same"
        )
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    for group, listed in zip(groups, current, strict=True):
        numbers = {saved_in.get(name, -1) for name in listed["parameters"]}
        number = numbers.pop() if len(numbers) == 1 else -1
        unknown = saved_in.keys() - local_names - set(remote_names)
        if number < 0 or saved[number]["optimizer"] != listed["optimizer"] or unknown:
            raise UserError("optimizer: the checkpoint groups the parameters in another way; use the same optimizer")
        for key, value in saved[number]["settings"].items():
            if isinstance(group.get(key), Tensor):
                group[key].fill_(value)
            else:
                group[key] = tuple(value) if isinstance(value, list) else value


def restore_optimizer(
    model: nn.Module,
    optimizers: list[Optimizer],
    files: SafetensorsFiles,
    checkpoint: str,
    remote_names: Collection[str] = (),
) -> None:
    """Build the state of fresh optimizers from a checkpoint, each tensor in the layout of its parameter.

    Args:
        checkpoint: its name, for messages.
        remote_names: parameters that only other ranks have.

    Raises:
        UserError: if the checkpoint has state for parameters that the optimizers do not hold.
    """
    saved_values: dict[str, list[str]] = {}
    for saved_name in files.tensors:
        if saved_name.startswith("optimizer."):
            saved_values.setdefault(saved_name.split(".", 2)[2], []).append(saved_name)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            held = {id(parameter) for parameter in group["params"]}
            for name, parameter in model.named_parameters():
                if id(parameter) in held:
                    optimizer.state[parameter] = {
                        saved_name.split(".", 2)[1]: restore_state_value(files, saved_name, parameter, group)
                        for saved_name in saved_values.pop(get_canonical_name(name), [])
                    }
    if unused := saved_values.keys() - set(remote_names):
        raise UserError(
            f"{checkpoint}: holds optimizer state of {', '.join(sorted(unused)[:5])}, which this run does not train"
        )


def restore_state_value(files: SafetensorsFiles, name: str, parameter: Tensor, group: dict[str, Any]) -> Any:
    """One value of a parameter's optimizer state, on the parameter's device and in its layout."""
    saved = files.tensors[name]
    if saved.is_number:
        return files.read(name).item()
    if saved.shape == tuple(parameter.shape) and saved.shape:
        tensor = torch.zeros_like(parameter, dtype=saved.dtype, requires_grad=False)
        files.copy_to(name, get_shard(tensor))
        return tensor
    # torch keeps step counters on the CPU unless the step itself runs on the device
    is_cpu_counter = not saved.shape and not (group.get("capturable") or group.get("fused"))
    return files.read(name).to("cpu" if is_cpu_counter else parameter.device, copy=True)
