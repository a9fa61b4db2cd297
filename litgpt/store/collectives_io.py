"""What the ranks of a run tell one another about tensors: who has which of them, and what went wrong."""

import hashlib
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from litgpt.errors import UserError

MESSAGE_BYTES = 400  # of a rank's error, so that every rank can say it

Warn = Callable[[str], None]
Group = dist.ProcessGroup | None


def print_to_stderr(message: str) -> None:
    """Print one line on standard error."""
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
    mine = torch.frombuffer(bytearray(record), dtype=torch.uint8).to(device)
    all_of_them = [torch.empty_like(mine) for _ in range(ranks)]
    dist.all_gather(all_of_them, mine, group=group)
    return [bytes(one.cpu().numpy()) for one in all_of_them]


def share_first_message(message: str, group: Group) -> str:
    """The first message that any rank has, the same on every rank; empty if none has one."""
    record = message.encode()[:MESSAGE_BYTES].ljust(MESSAGE_BYTES, b"\0")
    messages = (one.rstrip(b"\0").decode(errors="replace") for one in all_gather_bytes(record, group))
    return next((one for one in messages if one), "")


@contextmanager
def raise_on_all_ranks(group: Group) -> Iterator[None]:
    """Raise on every rank what any rank raises inside, where none may wait for another.

    Raises:
        UserError: that of the first rank that has one.
    """
    error: UserError | None = None
    try:
        yield
    except UserError as raised:
        error = raised
    message = share_first_message(str(error or ""), group)
    if message:
        raise error or UserError(message)


class StageRanks:
    """The ranks that hold parts of the same tensors as this one: all of them, or those of one stage of a pipeline.

    Attributes:
        place: this rank's number among them.
        number: how many they are.
        stages: sets of ranks with the same tensors.
        stage: the number of this rank's.
        firsts: the first rank of each.
    """

    def __init__(self, names: Iterable[str], group: Group) -> None:
        """Find them; every rank calls it with the names of the tensors that it holds parts of."""
        self.group = group
        rank, _ = get_rank_and_size(group)
        digests = all_gather_bytes(hashlib.sha256("\n".join(sorted(names)).encode()).digest(), group)
        alike = [other for other, digest in enumerate(digests) if digest == digests[rank]]
        self.place, self.number = alike.index(rank), len(alike)
        self.firsts = [digests.index(digest) for digest in dict.fromkeys(digests)]
        self.stages = len(self.firsts)
        self.stage = list(dict.fromkeys(digests)).index(digests[rank])

    def told(self, value: Any) -> list[Any]:
        """The value that each stage's first rank gives, in their order; every rank calls it."""
        if self.stages == 1:
            return [value]
        _, ranks = get_rank_and_size(self.group)
        values: list[Any] = [None] * ranks
        dist.all_gather_object(values, None if self.place else [value], self.group)
        return [one[0] for one in values if one is not None]

    def of_all_stages(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """The tensors of all stages on the first rank, one at a time, each name once; on others those of their own.

        All ranks iterate to the end together.

        Args:
            tensors: of this rank's stage, whole, on every rank of the stage alike.
        """
        rank, _ = get_rank_and_size(self.group)
        seen: set[str] = set()
        for stage, sender in enumerate(self.firsts):
            if stage == self.stage:
                mine = self._sent(tensors) if stage and not self.place else tensors
            else:
                mine = self._received(sender) if not rank else ()
            for name, tensor in mine:
                if name not in seen:
                    seen.add(name)
                    yield name, tensor

    def _sent(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in tensors:
            whole = tensor.detach().contiguous()
            dist.send_object_list([(name, tuple(whole.shape), whole.dtype, whole.device.type)], 0, self.group)
            dist.send(whole, 0, self.group)
            yield name, tensor
        dist.send_object_list([None], 0, self.group)

    def _received(self, sender: int) -> Iterator[tuple[str, Tensor]]:
        told: list[Any] = [None]
        while True:
            dist.recv_object_list(told, sender, self.group)
            if told[0] is None:
                return
            name, shape, dtype, device = told[0]
            tensor = torch.empty(shape, dtype=dtype, device=device)
            dist.recv(tensor, sender, self.group)
            yield name, tensor
