"""Exchange the values of parameters with others in place, under any layout."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from litgpt.parallel.apply import reshard_parameters


def get_local_tensor(tensor: Tensor) -> Tensor:
    """This rank's shard of a tensor, detached, with the same memory; all of it if the tensor is not sharded."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@contextmanager
def exchange_parameters(model: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Give parameters other values within the context, which holds no backward pass.

    They are exchanged one parameter at a time: `values` has the model's own values meanwhile. Both have the same bits
    as before when the context ends, also with an error. Sharded parameters keep their memory, which FSDP2 gathers from.
    Autocast forgets its copies of the parameters in a lower precision, which it would use within and after the context.

    Args:
        model: without a DDP wrapper.
        values: this rank's local tensors by the names of their parameters, on any device.
    """
    reshard_parameters(model)
    parameters = dict(model.named_parameters())
    changed = []
    try:
        for name, value in values.items():
            exchange_values(parameters[name], value)
            changed.append(name)
        torch.clear_autocast_cache()
        yield
    finally:
        forget_forward(model)
        for name in changed:
            exchange_values(parameters[name], values[name])
        torch.clear_autocast_cache()


@torch.no_grad()
def exchange_values(parameter: Tensor, value: Tensor) -> None:
    """Exchange the values of a parameter's local tensor and another tensor."""
    local = get_local_tensor(parameter)
    saved = local.clone()
    local.copy_(value)
    value.copy_(saved)


def forget_forward(model: nn.Module) -> None:
    """Free the all-gathered parameters of a forward pass without backward, which may have ended with an error.

    FSDP2 also forgets the order of its modules, by which the next backward pass would gather some of them in vain.
    """
    if isinstance(model, FSDPModule) and fully_shard.state(model)._is_root:  # type: ignore[attr-defined]
        model.reset_iter_state()
    else:
        reshard_parameters(model)
