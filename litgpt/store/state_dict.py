"""The state of a training run under names that do not depend on its layout: model, optimizers and random generators."""

import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from litgpt.errors import UserError
from litgpt.recipe.optimizer import OPTIMIZERS
from litgpt.store.safetensors_files import DTYPE_NAMES, SafetensorsFiles, SavedTensor, TensorShard, get_shard

REFERENCE = "reference."
"""The prefix of the names of other values of parameters in a checkpoint."""
RNG = "rng."
"""The prefix of the names of the states of random generators."""
OPTIMIZER_SETTINGS = {"peak_lr"} | {setting.name for cls in OPTIMIZERS.values() for setting in fields(cls)}
"""What parameter groups hold of a recipe, besides the arguments of any other optimizer class."""
TUNER_STATE = "tuner_"
"""The prefix of the keys that a tuner keeps in the state of any optimizer."""
BuildState = Callable[[nn.Parameter, Mapping[str, tuple[int, ...]]], Mapping[str, Tensor]]
"""A method of optimizers whose state has other shapes than its parameter: new tensors for those saved, of these shapes.
"""
Optimizers = Optimizer | Sequence[Optimizer] | None
WRAPPERS = re.compile(r"(?:^module\.)|(?:^|(?<=\.))(?:_forward_module|_orig_mod|_checkpoint_wrapped_module)\.")


def get_canonical_name(name: str) -> str:
    """A parameter's name without the prefixes of DDP, Fabric, `torch.compile` and activation checkpointing."""
    return WRAPPERS.sub("", name)


def iter_model_tensors(model: nn.Module, saved_names: Collection[str] | None = None) -> Iterator[tuple[str, Tensor]]:
    """Every parameter (a tied one once) and every persistent buffer of a model, by its canonical name.

    Args:
        saved_names: the names to list; None for all.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # after an evaluation the root module still holds unsharded weights
    tensors = [(get_canonical_name(name), parameter) for name, parameter in model.named_parameters()]
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                tensors.append((get_canonical_name(f"{prefix}.{name}" if prefix else name), buffer))
    return ((name, tensor) for name, tensor in tensors if saved_names is None or name in saved_names)


def iter_reference(model: nn.Module, values: Mapping[str, Tensor]) -> Iterator[tuple[str, TensorShard]]:
    """The shards of other values of some parameters of a model, in the layout of its own.

    Args:
        values: this rank's local tensors by name, which may be on another device.
    """
    for name, tensor in iter_model_tensors(model, values):
        yield name, replace(get_shard(tensor), local=values[name])


def restore_model(
    tensors: Mapping[str, Tensor], files: SafetensorsFiles, checkpoint: str, all_names: Collection[str]
) -> None:
    """Restore this rank's shards of a model's tensors from a checkpoint.

    Args:
        checkpoint: the name of the checkpoint, for messages.
        all_names: the names of all ranks' tensors.

    Raises:
        UserError: naming tensors that only the model or only the checkpoint has, or that differ in shape or type.
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
                f"{checkpoint}: {name} was saved as {format_tensor(stored)}, "
                f"in this run it is {format_tensor(tensor)}; use the same model and precision"
            )
    for name, tensor in tensors.items():
        files.copy_to(prefix + name, get_shard(tensor))


def list_optimizers(optimizer: Optimizers) -> list[Optimizer]:
    """The optimizers of a run as a list, without Fabric's wrapper."""
    optimizers = [] if optimizer is None else [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer)
    return [getattr(wrapped, "optimizer", wrapped) for wrapped in optimizers]


def iter_optimizer_state(model: nn.Module, optimizers: list[Optimizer]) -> Iterator[tuple[str, Any]]:
    """Yield the state that the optimizers keep for each parameter, as (`<key>.<parameter>`, tensor or number)."""
    names = {parameter: get_canonical_name(name) for name, parameter in model.named_parameters()}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                for key, value in optimizer.state.get(parameter, {}).items():
                    if value is not None:
                        check_state_value(key, names[parameter], value, parameter)
                        yield f"{key}.{names[parameter]}", value


def check_state_value(key: str, name: str, value: Any, parameter: Tensor) -> None:
    """Check that a value can be saved, and loaded by another number of ranks."""
    if not isinstance(value, Tensor | bool | int | float):
        raise UserError(f"optimizer state {key!r} of {name} is a {type(value).__name__}; only tensors and numbers save")
    if isinstance(parameter, DTensor) and isinstance(value, Tensor) and not isinstance(value, DTensor) and value.dim():
        raise UserError(
            f"optimizer state {key!r} of {name} is not sharded like its parameter, so it cannot be saved; "
            "use AdamW or PrecisionAwareAdamW, or parallel.data_shard: 1"
        )


def list_param_groups(model: nn.Module, optimizers: list[Optimizer]) -> list[dict[str, Any]]:
    """The optimizer, settings and parameter names of each parameter group, as JSON values."""
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
    """Merge the parameter groups of all stages: groups with the same optimizer and settings become one."""
    merged: dict[str, dict[str, Any]] = {}
    for group in (group for groups in groups_of_stages for group in groups):
        key = json.dumps([group["optimizer"], group["settings"]], sort_keys=True)
        target = merged.setdefault(key, {**group, "parameters": []})
        target["parameters"] = list(dict.fromkeys([*target["parameters"], *group["parameters"]]))
    return list(merged.values())


def restore_param_groups(
    model: nn.Module, optimizers: list[Optimizer], saved: list[dict[str, Any]], remote_names: Collection[str] = ()
) -> None:
    """Restore what an optimizer counts in its parameter groups, such as the steps of a schedule-free optimizer.

    Settings, such as betas or weight decay, are those of this run.

    Args:
        remote_names: parameters that only other ranks have.

    Raises:
        UserError: if the saved groups are of another optimizer or have other parameters.
    """
    current = list_param_groups(model, optimizers)
    saved_in = {name: number for number, group in enumerate(saved) for name in group["parameters"]}
    local_names = {name for group in current for name in group["parameters"]}
    kinds, saved_kinds = ({group["optimizer"] for group in groups} for groups in (current, saved))
    if kinds - saved_kinds or (not remote_names and saved_kinds - kinds):
        raise UserError(
            f"optimizer: the checkpoint was saved with {sorted(saved_kinds)}, this run has {sorted(kinds)}; "
            "use the same, or set checkpoint.load_optimizer: false"
        )
    groups = [(group, type(optimizer)) for optimizer in optimizers for group in optimizer.param_groups]
    for (group, cls), listed in zip(groups, current, strict=True):
        numbers = {saved_in.get(name, -1) for name in listed["parameters"]}
        number = numbers.pop() if len(numbers) == 1 else -1
        unknown = saved_in.keys() - local_names - set(remote_names)
        if number < 0 or saved[number]["optimizer"] != listed["optimizer"] or unknown:
            raise UserError(
                "optimizer: the checkpoint groups the parameters in another way; use the same optimizer, or set "
                "checkpoint.load_optimizer: false"
            )
        settings = OPTIMIZER_SETTINGS | signature(cls).parameters.keys()
        for key, value in saved[number]["settings"].items():
            if key in settings:
                continue
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
    """Build the state of new optimizers from a checkpoint, each tensor in the layout of its parameter.

    Args:
        checkpoint: the name of the checkpoint, for messages.
        remote_names: parameters that only other ranks have.

    Raises:
        UserError: if the checkpoint has state for parameters that the optimizers do not hold, or in other formats.
    """
    saved_values: dict[str, list[str]] = {}
    for saved_name in files.tensors:
        if saved_name.startswith("optimizer."):
            saved_values.setdefault(saved_name.split(".", 2)[2], []).append(saved_name)
    for optimizer in optimizers:
        build_state: BuildState | None = getattr(optimizer, "build_state", None)
        for group in optimizer.param_groups:
            held = {id(parameter) for parameter in group["params"]}
            for name, parameter in model.named_parameters():
                if id(parameter) in held:
                    names = saved_values.pop(get_canonical_name(name), [])
                    optimizer.state[parameter] = restore_parameter_state(files, names, parameter, group, build_state)
    if unused := saved_values.keys() - set(remote_names):
        raise UserError(
            f"{checkpoint}: holds optimizer state of {', '.join(sorted(unused)[:5])}, which this run does not train"
        )


def restore_parameter_state(
    files: SafetensorsFiles,
    names: Iterable[str],
    parameter: nn.Parameter,
    group: dict[str, Any],
    build_state: BuildState | None,
) -> dict[str, Any]:
    """Read the optimizer state of a parameter.

    Args:
        names: of its values in `files`.
        build_state: of the optimizer; None to build tensors by their shapes.

    Raises:
        UserError: naming the first tensor that the optimizer has in another format.
    """
    keys = {name.split(".", 2)[1]: name for name in names}
    given = {key: name for key, name in keys.items() if not key.startswith(TUNER_STATE)}
    saved = {key: files.tensors[name] for key, name in given.items() if not files.tensors[name].is_number}
    built = (
        build_state(parameter, {key: tensor.shape for key, tensor in saved.items()}) if build_state and given else {}
    )
    for key in dict.fromkeys([*built, *saved]) if built else ():
        was, now = (format_tensor(values[key]) if key in values else "absent" for values in (saved, built))
        if was != now:
            _, _, name = next(iter(keys.values())).split(".", 2)
            raise UserError(
                f"optimizer: {key} of {name} was saved as {was}, in this run it is {now}; use the same "
                "optimizer.init_args"
            )
    return {key: restore_state_value(files, name, parameter, group, built.get(key)) for key, name in keys.items()}


def format_tensor(tensor: Tensor | SavedTensor) -> str:
    """The type and shape of a tensor, for messages."""
    return f"{DTYPE_NAMES[tensor.dtype]} {list(tensor.shape)}"


def restore_state_value(
    files: SafetensorsFiles, name: str, parameter: Tensor, group: dict[str, Any], built: Tensor | None
) -> Any:
    """Read one value of a parameter's optimizer state, on the parameter's device and in its layout.

    Args:
        built: the tensor to read into; None to build one.
    """
    saved = files.tensors[name]
    if saved.is_number:
        return files.read(name).item()
    if built is not None:
        files.copy_to(name, get_shard(built))
        return built
    if saved.shape == tuple(parameter.shape) and saved.shape:
        tensor = torch.zeros_like(parameter, dtype=saved.dtype, requires_grad=False)
        files.copy_to(name, get_shard(tensor))
        return tensor
    # torch keeps step counters on the CPU unless the step itself runs on the device
    is_cpu_counter = not saved.shape and not (group.get("capturable") or group.get("fused"))
    return files.read(name).to("cpu" if is_cpu_counter else parameter.device, copy=True)


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
        name = f"{RNG}{rank:05d}.{device}"
        if name in files.tensors and (device == "cpu" or torch.cuda.is_available()):
            setter(files.read(name))


def select_shards(
    tensors: Iterable[tuple[str, Any]], rank: int, ranks: int
) -> Iterator[tuple[str, Tensor, dict[str, Any]]]:
    """Yield the shards that this rank writes: name, shard, and the shape of the full tensor with the shard's offset.

    Values are tensors, shards or numbers.

    Every rank of the first replica writes its own shard of a sharded tensor; tensors that are the same on all `ranks`
    are divided among them by size. A Python number is written as a tensor without dimensions.
    """
    replicated: list[tuple[str, Tensor, dict[str, Any]]] = []
    for name, value in tensors:
        is_number = not isinstance(value, Tensor | TensorShard)
        # float64, to give the same Python number back
        tensor = torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else None) if is_number else value
        shard = tensor if isinstance(tensor, TensorShard) else get_shard(tensor)
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
