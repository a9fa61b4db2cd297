"""Collectives for checkpoints: sharing errors and bytes, and gathering the tensors of all stages on the first rank."""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from litgpt.errors import UserError
from litgpt.messages import print_message

MESSAGE_BYTES = 400  # the length to which a rank's error is cut

Warn = Callable[[str], None]


@cache
def warn_once(message: str) -> None:
    """Print one line to standard error, on the first rank and once in a process."""
    if get_rank() == 0:
        print_message(message)


def get_rank() -> int:
    """The rank of this process; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def get_world_size() -> int:
    """The number of ranks; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def all_gather_bytes(record: bytes) -> list[bytes]:
    """Every rank's `record`, all of one length, in rank order."""
    if get_world_size() == 1:
        return [record]
    device = "cuda" if "nccl" in dist.get_backend() else "cpu"
    tensor = torch.frombuffer(bytearray(record), dtype=torch.uint8).to(device)
    outputs = [torch.empty_like(tensor) for _ in range(get_world_size())]
    dist.all_gather(outputs, tensor)
    return [bytes(received.cpu().numpy()) for received in outputs]


def share_first_message(message: str) -> str:
    """Return, on every rank, the message of the first rank whose message is not empty; empty if all are."""
    record = message.encode()[:MESSAGE_BYTES].ljust(MESSAGE_BYTES, b"\0")
    messages = (received.rstrip(b"\0").decode(errors="replace") for received in all_gather_bytes(record))
    return next(filter(None, messages), "")


@contextmanager
def raise_on_all_ranks() -> Iterator[None]:
    """Raise a UserError on every rank if any rank raises one inside the block, so that no rank waits for another.

    Raises:
        UserError: that of the first rank with an error, or this rank's own.
    """
    error: UserError | None = None
    try:
        yield
    except UserError as failure:
        error = failure
    message = share_first_message(str(error or ""))
    if message:
        raise error or UserError(message)


class StageRanks:
    """The ranks that hold shards of the same tensors as this one: all ranks, or those of one pipeline stage.

    Attributes:
        rank: the rank of this process in its stage.
        size: the number of ranks of the stage.
        stage: the index of this rank's stage.
        first_ranks: the first rank of each stage.
    """

    def __init__(self, names: Iterable[str]) -> None:
        """Compare the names of the tensors that each rank holds shards of; every rank calls it with its own."""
        rank, digest = get_rank(), hashlib.sha256("\n".join(sorted(names)).encode()).digest()
        digests = all_gather_bytes(digest)
        stage_digests = list(dict.fromkeys(digests))
        self.rank, self.size = digests[:rank].count(digest), digests.count(digest)
        self.stage = stage_digests.index(digest)
        self.first_ranks = [digests.index(digest) for digest in stage_digests]

    def all_gather_object(self, value: Any) -> list[Any]:
        """The values of the first ranks of all stages, in the order of the stages; every rank calls it."""
        if len(self.first_ranks) == 1:
            return [value]
        values: list[Any] = [None] * get_world_size()
        dist.all_gather_object(values, None if self.rank else [value])
        return [received[0] for received in values if received is not None]

    def gather_tensors(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors of all stages on the first rank, each name once, and on other ranks those of their stage.

        All ranks iterate to the end together.

        Args:
            tensors: the full tensors of this rank's stage, the same on every rank of the stage.
        """
        seen: set[str] = set()
        for stage, sender in enumerate(self.first_ranks):
            if stage == self.stage:
                local = self._send(tensors) if stage and not self.rank else tensors
            else:
                local = self._receive(sender) if get_rank() == 0 else ()
            for name, tensor in local:
                if name not in seen:
                    seen.add(name)
                    yield name, tensor

    def _send(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in tensors:
            values = tensor.detach().contiguous()
            dist.send_object_list([(name, tuple(values.shape), values.dtype, values.device.type)], 0)
            dist.send(values, 0)
            yield name, tensor
        dist.send_object_list([None], 0)

    def _receive(self, sender: int) -> Iterator[tuple[str, Tensor]]:
        header: list[Any] = [None]
        while True:
            dist.recv_object_list(header, sender)
            if header[0] is None:
                return
            name, shape, dtype, device = header[0]
            tensor = torch.empty(shape, dtype=dtype, device=device)
            dist.recv(tensor, sender)
            yield name, tensor
