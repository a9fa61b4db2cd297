"""Mark what a run on an accelerator keeps in host memory, when all of its tensors are on the CPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from litgpt.parallel.host_copies import HostCopies, Pair
from litgpt.parallel.offload import HostOffload
from litgpt.plan.allocations import HOST, AllocationRecorder


@contextmanager
def mark_host_copies(recorder: AllocationRecorder) -> Iterator[None]:
    """Record the copies of tensors in host memory as such, and those that come back as others."""
    pack, iterate = HostOffload.pack, HostCopies.__iter__

    def pack_on_host(offload: HostOffload, tensor: Tensor) -> Any:
        packed = pack(offload, tensor)
        if packed is not tensor:
            recorder.mark(HOST, [packed.values])
        return packed

    def unpack_from_host(_offload: HostOffload, packed: Any) -> Tensor:
        return packed if isinstance(packed, Tensor) else packed.values.clone()

    def iterate_on_host(copies: HostCopies) -> Iterator[Pair]:
        for weight, gradient in iterate(copies):
            recorder.mark(HOST, [weight])
            yield weight, gradient

    with (
        patch.object(HostOffload, "pack", pack_on_host),
        patch.object(HostOffload, "unpack", unpack_from_host),
        patch.object(HostCopies, "__iter__", iterate_on_host),
    ):
        yield


def list_offloaded_states(optimizer: torch.optim.Optimizer) -> list[Any]:
    """The states that an optimizer keeps in host memory, among other values."""
    on_host = getattr(optimizer, "on_host", ())
    return [value for parameter in on_host for value in optimizer.state[parameter].values()]
