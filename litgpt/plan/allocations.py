"""Record every allocation of a program: its bytes, when it was made and freed, and by what."""

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass

from litgpt.parallel.shape_propagation import hidden_shape_propagation
from litgpt.plan.op_tensors import DEVICE_QUERY, get_device, iter_op_tensors

COLLECTIVES = ("c10d", "_c10d_functional")
HOST = "host"
"""The kind of memory that is not the device's."""


@dataclass(slots=True)
class StepPhase:
    """A part of a program, from one event to another.

    Attributes:
        number: how many phases of this name there were before it.
        end: None while it lasts.
    """

    name: str
    number: int
    start: int
    end: int | None = None


@dataclass(slots=True)
class Allocation:
    """The memory of one storage from when it was made until it was freed or resized.

    Attributes:
        start, end: numbers of events, of which each allocation and each release is one; `end` is None while it lives.
        phase: the phase of the program in which it was made.
        op: the operation that made it.
        shape: of the tensor that the operation returned with it.
        records_graph: whether it was made while autograd recorded operations.
        kind: what it holds, once that is known.
        is_sent: whether it was an argument of a collective.
    """

    bytes: int
    start: int
    phase: StepPhase
    op: str
    shape: tuple[int, ...]
    records_graph: bool = False
    end: int | None = None
    kind: str | None = None
    is_sent: bool = False


class AllocationRecorder(TorchDispatchMode):
    """Records the storages of the tensors that operations return, fake or real, but not on the meta device.

    Memory that an operation takes and frees inside of its kernel is not seen.

    Attributes:
        allocations: all of them, in order.
        events: the number of allocations and releases so far.
        phase: what the program does now.
    """

    def __init__(self) -> None:
        super().__init__()
        self.allocations: list[Allocation] = []
        self.events = 0
        self.phase = StepPhase("", 0, 0)
        self._phases: Counter[str] = Counter()
        self._last: dict[int, Allocation] = {}  # of each storage
        self._references: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._resize = torch.UntypedStorage.resize_
        self._patches = ExitStack()

    def __enter__(self) -> "AllocationRecorder":
        recorder = self

        def resize(storage: torch.UntypedStorage, size: int) -> Any:
            result = recorder._resize(storage, size)
            recorder._record_resize(storage)
            return result

        # FSDP2 frees and takes the memory of gathered parameters in this way, which is no operation
        self._patches.enter_context(patch.object(torch.UntypedStorage, "resize_", resize))
        self._patches.enter_context(hidden_shape_propagation())
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self._patches.close()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and record the storages of the tensors that it returns."""
        if any(issubclass(kind, Tensor) and hasattr(kind, "__tensor_flatten__") for kind in types):
            return NotImplemented  # its own operations on plain tensors come here
        output = func(*args, **(kwargs or {}))
        if func is DEVICE_QUERY:
            return output
        for tensor in iter_op_tensors(output):
            self._record(tensor, str(func))
        if func.namespace == "fsdp":
            self.mark("communication", list_written(func._schema, args, kwargs or {}))
        elif func.namespace in COLLECTIVES:
            for tensor in iter_op_tensors((args, kwargs, output)):
                if (allocation := self._record(tensor, str(func))) is not None:
                    allocation.is_sent = True
        return output

    @contextmanager
    def enter_phase(self, name: str) -> Iterator[None]:
        """Name what the program does in the block."""
        before, number = self.phase, self._phases[name]
        self._phases[name] += 1
        self.phase = StepPhase(name, number, self.events)
        try:
            yield
        finally:
            self.phase.end, self.phase = self.events, before

    def mark(self, kind: str, tensors: Iterable[Any]) -> None:
        """Set what the memory of tensors holds, unless that is known already; other values are ignored."""
        for tensor in (tensor for tensor in tensors if isinstance(tensor, Tensor)):
            for plain in list_plain_tensors(tensor):
                allocation = self._record(plain, "given")
                if allocation is not None and allocation.kind in (None, "communication"):
                    allocation.kind = kind

    def _record(self, tensor: Tensor, op: str) -> Allocation | None:
        """The last allocation of a tensor's storage, a new one if the storage is new; None without one."""
        if get_device(tensor).type == "meta" or is_traceable_wrapper_subclass(tensor):
            return None
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._last and storage.nbytes():
            self._references[key] = weakref.ref(storage, lambda _: self._release(key))
            self._begin(key, storage.nbytes(), op, tuple(tensor.shape))
        return self._last.get(key)

    def _begin(self, key: int, size: int, op: str, shape: tuple[int, ...], kind: str | None = None) -> None:
        allocation = Allocation(size, self.events, self.phase, op, shape, torch.is_grad_enabled(), kind=kind)
        self.events += 1
        self.allocations.append(allocation)
        self._last[key] = allocation

    def _end(self, key: int) -> Allocation:
        allocation = self._last[key]
        if allocation.end is None:
            allocation.end = self.events
            self.events += 1
        return allocation

    def _release(self, key: int) -> None:
        self._end(key)
        del self._last[key], self._references[key]

    def _record_resize(self, storage: torch.UntypedStorage) -> None:
        if (key := storage._cdata) in self._last:
            before = self._end(key)
            if storage.nbytes():
                self._begin(key, storage.nbytes(), before.op, before.shape, before.kind)


def list_written(schema: torch.FunctionSchema, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors that an operation writes to."""
    named = {argument.name: value for argument, value in zip(schema.arguments, args, strict=False)} | kwargs
    written = [argument.name for argument in schema.arguments if argument.alias_info and argument.alias_info.is_write]
    return list(iter_op_tensors([named.get(name) for name in written]))


def list_plain_tensors(tensor: Tensor) -> Iterator[Tensor]:
    """The plain tensors that a tensor consists of, such as the local one of a DTensor."""
    if not is_traceable_wrapper_subclass(tensor):
        yield tensor
        return
    names, _ = tensor.__tensor_flatten__()
    for part in (getattr(tensor, name) for name in names):
        if isinstance(part, Tensor):  # a DTensor has its mesh among its parts
            yield from list_plain_tensors(part)


def find_peak(allocations: Iterable[Allocation], first: int, last: int) -> int:
    """The event in [first, last) after which the most bytes are in use."""
    changes: dict[int, int] = {first: 0}
    for allocation in allocations:
        if allocation.start >= last or (allocation.end is not None and allocation.end <= first):
            continue
        start = max(first, allocation.start)
        changes[start] = changes.get(start, 0) + allocation.bytes
        if allocation.end is not None and allocation.end < last:
            changes[allocation.end] = changes.get(allocation.end, 0) - allocation.bytes
    events = sorted(changes)
    totals = list(accumulate(changes[event] for event in events))
    return events[max(range(len(events)), key=totals.__getitem__)]


def list_in_use(allocations: Iterable[Allocation], event: int) -> list[Allocation]:
    """The allocations that are in use after an event."""
    return [kept for kept in allocations if kept.start <= event and (kept.end is None or kept.end > event)]
