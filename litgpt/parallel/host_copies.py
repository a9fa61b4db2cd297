"""Weights and gradients in host memory while an optimizer updates them there."""

from collections import deque
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from litgpt.parallel.offload import get_copy_stream

Pair = tuple[Tensor, Tensor]
AHEAD = 2
"""The number of weights whose copies are under way while one is updated."""


class HostCopies:
    """Yields copies of weights and their gradients in host memory, and copies each weight back once it is updated.

    On CUDA, copies in both directions overlap with the kernels that are launched before the iteration, and with the
    updates. What is launched after the iteration waits for the last copy.

    Args:
        pairs: weights and gradients on one device.
    """

    def __init__(self, pairs: Sequence[Pair]) -> None:
        self.pairs = deque(pairs)
        self.stream = None
        if pairs and (device := pairs[0][0].device).type == "cuda":
            self.stream = get_copy_stream(device)
            self.stream.wait_stream(torch.cuda.current_stream(device))
        self.started: deque[tuple[Tensor, Pair, torch.cuda.Event | None]] = deque()
        self._start()

    def _start(self) -> None:
        """Start to copy the next weights and gradients."""
        while self.pairs and len(self.started) <= AHEAD:
            weight, gradient = self.pairs.popleft()
            if self.stream is None:
                self.started.append((weight, (weight.cpu().clone(), gradient.cpu()), None))
                continue
            with torch.cuda.stream(self.stream):
                copies = (copy_to_host(weight), copy_to_host(gradient))
                self.started.append((weight, copies, self.stream.record_event()))

    def __iter__(self) -> Iterator[Pair]:
        while self.started:
            weight, copies, copy_event = self.started.popleft()
            self._start()
            if copy_event is not None:
                copy_event.synchronize()
            yield copies
            with torch.cuda.stream(self.stream):  # without effect if it is None
                weight.copy_(copies[0], non_blocking=True)
        if self.stream is not None:
            torch.cuda.current_stream(self.stream.device).wait_stream(self.stream)


def copy_to_host(tensor: Tensor) -> Tensor:
    """Start to copy a tensor on a CUDA device to pinned memory."""
    return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)
