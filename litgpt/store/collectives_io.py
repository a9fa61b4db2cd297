"""Collectives of reading and writing: errors, bytes, and the tensors of all pipeline stages on the first rank."""

import hashlib
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from litgpt.errors import UserError

MESSAGE_BYTES = 400  # of a rank's error that is sent to all ranks

Warn = Callable[[str], None]
Group = dist.ProcessGroup | None


def print_warning(message: str) -> None:
    """Print one line to standard error."""
    print(message, file=sys.stderr, flush=True)


def get_rank_and_size(group: Group = None) -> tuple[int, int]:
    """This process's rank and the number of ranks; 0 of 1 without a process group."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(group), dist.get_world_size(group)


def all_gather_bytes(record: bytes, group: Group) -> list[bytes]:
    """Every rank's `record`, all of one length, in rank order."""
    _, ranks = get_rank_and_size(group)
    if ranks == 1:
        return [record]
    device = "cuda" if "nccl" in dist.get_backend(group) else "cpu"
    tensor = torch.frombuffer(bytearray(record), dtype=torch.uint8).to(device)
    outputs = [torch.empty_like(tensor) for _ in range(ranks)]
    dist.all_gather(outputs, tensor, group=group)
    return [bytes(received.cpu().numpy()) for received in outputs]


def share_first_message(message: str, group: Group) -> str:
    """Return the first message that any rank has, the same on every rank; empty if none has one."""
    record = message.encode()[:MESSAGE_BYTES].ljust(MESSAGE_BYTES, b"\0")
    messages = (received.rstrip(b"\0").decode(errors="replace") for received in all_gather_bytes(record, group))
    return next(filter(None, messages), "")


@contextmanager
def raise_on_all_ranks(group: Group) -> Iterator[None]:
    """Raise on every rank the error that any rank raises inside, so that none waits for another.

    Raises:
        UserError: of the first rank that has one.
    """
    error: UserError | None = None
    try:
        yield
    except UserError as failure:
        error = failure
    message = share_first_message(str(error or ""), group)
    if message:
        raise error or UserError(message)


class StageRanks:
    """The ranks that hold shards of the same tensors as this one: all of them, or those of one pipeline stage.

    Attributes:
        rank: of this process among them.
        size: how many they are.
        stage: the index of this rank's stage.
        first_ranks: the first rank of each stage.
    """

    def __init__(self, names: Iterable[str], group: Group) -> None:
        """Find them; every rank calls it with the names of the tensors that it holds shards of."""
        self.group = group
        rank, _ = get_rank_and_size(group)
        digests = all_gather_bytes(hashlib.sha256("\n".join(sorted(names)).encode()).digest(), group)
        stage_digests = list(dict.fromkeys(digests))
        same = [other for other, digest in enumerate(digests) if digest == digests[rank]]
        self.rank, self.size = same.index(rank), len(same)
        self.stage = stage_digests.index(digests[rank])
        self.first_ranks = [digests.index(digest) for digest in stage_digests]

    def all_gather_object(self, value: Any) -> list[Any]:
        """The value that each stage's first rank gives, in their order; every rank calls it."""
        if len(self.first_ranks) == 1:
            return [value]
        _, ranks = get_rank_and_size(self.group)
        values: list[Any] = [None] * ranks
        dist.all_gather_object(values, None if self.rank else [value], self.group)
        return [received[0] for received in values if received is not None]

    def gather_tensors(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """The tensors of all stages on the first rank, one at a time, each name once; on others those of their own.

        All ranks iterate to the end together.

        Args:
            tensors: of this rank's stage, in full, the same on every rank of the stage.
        """
        rank, _ = get_rank_and_size(self.group)
        seen: set[str] = set()
        for stage, sender in enumerate(self.first_ranks):
            if stage == self.stage:
                local = self._send(tensors) if stage and not self.rank else tensors
            else:
                local = self._receive(sender) if not rank else ()
            for name, tensor in local:
                if name not in seen:
                    seen.add(name)
                    yield name, tensor

    def _send(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in tensors:
            values = tensor.detach().contiguous()
            dist.send_object_list([(name, tuple(values.shape), values.dtype, values.device.type)], 0, self.group)
            dist.send(values, 0, self.group)
            yield name, tensor
        dist.send_object_list([None], 0, self.group)

    def _receive(self, sender: int) -> Iterator[tuple[str, Tensor]]:
        header: list[Any] = [None]
        while True:
            dist.recv_object_list(header, sender, self.group)
            if header[0] is None:
                return
            name, shape, dtype, device = header[0]
            tensor = torch.empty(shape, dtype=dtype, device=device)
            dist.recv(tensor, sender, self.group)
            yield name, tensor
