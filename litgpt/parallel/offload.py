"""Activation offloading: keep the tensors that are saved for backward in host memory."""

from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from litgpt.model.surgery import Function, wrap_forward


class OffloadedTensor(NamedTuple):
    """A tensor in host memory, the device that it was on, and the CUDA event of its copy, if any."""

    values: Tensor
    device: torch.device
    copy_event: Any


class HostOffload:
    """Saves a block's activations in host memory; on accelerators copies overlap with computation."""

    def __init__(self, block: nn.Module) -> None:
        self.block = block
        self.parameters: set[int] = set()
        experts = getattr(block, "experts", None)
        if experts is not None:  # FSDP2 all-gathers them later than the rest of the block
            wrap_forward(experts, partial(self._add_experts, experts))

    def begin(self) -> None:
        """Record the memory of the block's parameters, which stay on the device."""
        self.parameters = {storage_pointer(parameter) for parameter in self.block.parameters()}

    def _add_experts(self, experts: nn.Module, forward: Function) -> Function:
        def wrapped(*args: Any) -> Tensor:
            self.parameters.update(map(storage_pointer, experts.parameters()))
            return forward(*args)

        return wrapped

    def pack(self, tensor: Tensor) -> Any:
        """Copy a tensor to the host, unless it is a parameter or a scalar."""
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

    def unpack(self, packed: Any) -> Tensor:
        """Copy a tensor back to its device."""
        if isinstance(packed, Tensor):
            return packed
        if packed.copy_event is not None:
            torch.cuda.current_stream(packed.device).wait_event(packed.copy_event)
        return packed.values.to(packed.device, non_blocking=True)


@cache
def get_copy_stream(device: torch.device) -> torch.cuda.Stream:
    """The CUDA stream of a device for copies to the host."""
    return torch.cuda.Stream(device)


def storage_pointer(tensor: Tensor) -> int:
    """The address of the storage of a tensor, or of its local tensor; other than that of its memory, never zero."""
    local = getattr(tensor, "_local_tensor", tensor)
    return local.untyped_storage()._cdata
