"""What layers keep for backward, in host memory instead of on the device."""

from collections.abc import Callable
from functools import wraps
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from litgpt.model.surgery import Function, wrap_forward


class SavedTensorHooks(Protocol):
    """Decides what is kept for backward in place of each tensor that a function saves."""

    def begin(self) -> None:
        """A forward pass begins."""

    def pack(self, tensor: Tensor) -> Any:
        """What to keep for a tensor."""

    def unpack(self, kept: Any) -> Tensor:
        """The tensor for what was kept."""


def use_saved_tensor_hooks(keeper: SavedTensorHooks, function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that hands what it keeps for backward to a keeper."""

    @wraps(function)
    def kept(*arguments: Any, **named: Any) -> Any:
        keeper.begin()
        with saved_tensors_hooks(keeper.pack, keeper.unpack):
            return function(*arguments, **named)

    return kept


class OffloadedTensor(NamedTuple):
    """A tensor in host memory, the device that it was on, and when it has arrived."""

    values: Tensor
    device: torch.device
    arrived: Any


class HostOffload:
    """Keeps a block's activations in host memory; copies run beside the computation on accelerators."""

    def __init__(self, block: nn.Module) -> None:
        self.block = block
        self.parameters: set[int] = set()
        experts: Any = getattr(block, "experts", None)
        if experts is not None:  # sharded by themselves, they are gathered after the rest of the block
            wrap_forward(experts, self._note_experts)

    def begin(self) -> None:
        """A forward pass begins: note where the block's parameters are, which stay on the device."""
        self.parameters = set()
        self.note(self.block)

    def _note_experts(self, forward: Function) -> Function:
        def noted(*arguments: Any) -> Tensor:
            self.note(self.block.experts)  # type: ignore[arg-type]
            return forward(*arguments)

        return noted

    def note(self, module: nn.Module) -> None:
        """Add where a module's parameters are."""
        self.parameters.update(storage_pointer(parameter) for parameter in module.parameters())

    def pack(self, tensor: Tensor) -> Any:
        """Send a tensor to the host, unless it is a parameter or a number."""
        if not tensor.dim() or storage_pointer(tensor) in self.parameters:
            return tensor
        if tensor.device.type != "cuda":
            return OffloadedTensor(tensor.to("cpu", copy=True), tensor.device, None)
        values = torch.empty_like(tensor, device="cpu", pin_memory=True)
        stream = get_copy_stream(tensor.device)
        stream.wait_stream(torch.cuda.current_stream(tensor.device))
        with torch.cuda.stream(stream):
            values.copy_(tensor, non_blocking=True)
            tensor.record_stream(stream)
        return OffloadedTensor(values, tensor.device, stream.record_event())

    def unpack(self, kept: Any) -> Tensor:
        """Bring a tensor back."""
        if isinstance(kept, Tensor):
            return kept
        if kept.arrived is not None:
            torch.cuda.current_stream(kept.device).wait_event(kept.arrived)
        return kept.values.to(kept.device, non_blocking=True)


STREAMS: dict[torch.device, torch.cuda.Stream] = {}


def get_copy_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream of a device that copies to the host."""
    if device not in STREAMS:
        STREAMS[device] = torch.cuda.Stream(device)
    return STREAMS[device]


def storage_pointer(tensor: Tensor) -> int:
    """Where a tensor's memory begins, or that of this rank's part of it."""
    local = getattr(tensor, "_local_tensor", tensor)
    return local.untyped_storage().data_ptr()
