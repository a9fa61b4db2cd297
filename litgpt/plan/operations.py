"""Record the work of a program: products, memory traffic and collectives, without values."""

import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from litgpt.parallel.collective_calls import Collective, read_collective
from litgpt.plan.allocations import COLLECTIVES, StepPhase, list_written
from litgpt.plan.op_tensors import get_device, iter_op_tensors

OperationKind = Literal["matmul", "attention", "memory", "collective"]
NOT_WRITTEN = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
PARTIAL = (
    *("embedding", "index", "index_select", "gather", "index_add_", "index_copy_", "index_put_", "scatter_"),
    *("scatter_add_", "all_gather_copy_in"),
)
"""Operations that read, or write, only a part of their largest tensor."""
NO_WORK = ("prim", "profiler", "inductor")
BACKWARD_SHARE = 2.5  # of the products of attention: five instead of two (Dao et al. 2022, "FlashAttention")


@dataclass(slots=True)
class Operation:
    """A kernel, or a chain of element-wise operations that one kernel runs.

    Attributes:
        phase, number: of the step in which it is run, and how many phases of this name there were before it.
        backward: whether autograd runs it in a backward pass, as it does what is recomputed there.
        flops: of products; 0 for other kinds.
        dtype: of the operands of a product.
        bytes: read and written in the GPU's memory; of a collective, 0.
        overlaps: whether a collective gathers parameters or reduces gradients, which is done during computation.
    """

    kind: OperationKind
    name: str
    phase: str
    number: int
    backward: bool
    bytes: int = 0
    flops: float = 0.0
    dtype: torch.dtype | None = None
    collective: Collective | None = None
    overlaps: bool = False


class Chain:
    """Element-wise operations that follow each other, which a compiler can run as one kernel.

    Their traffic is what they read from outside, and what is still in use after them.
    """

    def __init__(self) -> None:
        self.read: dict[int, int] = {}
        self.created: dict[int, tuple[int, weakref.ref[torch.UntypedStorage]]] = {}
        self.written: dict[int, int] = {}
        self._numbers: dict[int, tuple[int, weakref.ref[torch.UntypedStorage]]] = {}
        self._next = count()

    def add(self, read: Sequence[Tensor], written: Sequence[Tensor], created: Sequence[Tensor]) -> None:
        """Add an operation by its tensors."""
        for tensor in created:
            storage = tensor.untyped_storage()
            self.created[self._number(storage)] = count_bytes(tensor), weakref.ref(storage)
        for tensors, sizes in ((read, self.read), (written, self.written)):
            for tensor in tensors:
                if (number := self._number(tensor.untyped_storage())) not in self.created:
                    sizes[number] = max(sizes.get(number, 0), count_bytes(tensor))

    def _number(self, storage: torch.UntypedStorage) -> int:
        """The number of a storage; another one at the address of one that is freed has its own."""
        key = storage._cdata
        number, reference = self._numbers.get(key, (-1, None))
        if reference is None or reference() is None:
            number = next(self._next)
            self._numbers[key] = number, weakref.ref(storage)
        return number

    def count_traffic(self) -> int:
        """Bytes that are read and written."""
        kept = sum(size for size, storage in self.created.values() if storage() is not None)
        return sum(self.read.values()) + sum(self.written.values()) + kept


class OperationRecorder(TorchDispatchMode):
    """Records the operations of a program on tensors, fake or real.

    Args:
        fused: whether chains of element-wise operations are one kernel. Those of optimizers always are.

    Attributes:
        operations: all of them, in order.
        phase: returns what the program does now.
        micro_batches: of the step that is recorded.
    """

    def __init__(self, *, fused: bool) -> None:
        super().__init__()
        self.fused = fused
        self.phase: Callable[[], StepPhase] = lambda: StepPhase("", 0, 0)
        self.operations: list[Operation] = []
        self.micro_batches = 1
        self._chain = Chain()
        self._chain_place: tuple[str, int, bool] = ("", 0, False)
        self._sharded: dict[int, weakref.ref[torch.UntypedStorage]] = {}  # buffers of FSDP2's collectives

    def of_step(self, phase: Callable[[], StepPhase], micro_batches: int) -> "OperationRecorder":
        """The recorder as a context in which a step is taken."""
        self.phase, self.micro_batches = phase, micro_batches
        return self

    def __exit__(self, *exception: Any) -> None:
        self._end_chain()
        super().__exit__(*exception)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and record it."""
        if any(issubclass(kind, Tensor) and hasattr(kind, "__tensor_flatten__") for kind in types):
            return NotImplemented  # its own operations on plain tensors come here
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if func.namespace in NO_WORK or getattr(func, "is_view", False):
            return output
        if func.namespace in COLLECTIVES:
            self._add_collective(func, args, kwargs)
        else:
            self._add_computation(func, args, kwargs, output)
        return output

    def _add_collective(self, func: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if (collective := read_collective(func, args, kwargs)) is None:
            return
        storages = [tensor.untyped_storage() for tensor in list_tensors((args, kwargs))]
        overlaps = any(map(self._is_sharded, storages))
        if overlaps:  # an all-reduce over replicas may follow a reduce-scatter
            self._sharded |= {storage._cdata: weakref.ref(storage) for storage in storages}
        overlaps |= collective.kind == "all_reduce" and collective.is_async  # of DDP
        self._add("collective", func, collective=collective, overlaps=overlaps)

    def _is_sharded(self, storage: torch.UntypedStorage) -> bool:
        reference = self._sharded.get(storage._cdata)
        return reference is not None and reference() is not None

    def _add_computation(self, func: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        name = func._schema.name.partition("::")[2]
        inputs, outputs = list_tensors((args, kwargs)), list_tensors(output)
        written = list_written(func._schema, args, kwargs)
        if func.namespace == "fsdp":
            written = written or outputs  # what `all_gather_copy_in` writes to is not in its schema
            self._sharded |= {t.untyped_storage()._cdata: weakref.ref(t.untyped_storage()) for t in written}
        known = {tensor.untyped_storage()._cdata for tensor in inputs}
        created = [tensor for tensor in outputs if tensor.untyped_storage()._cdata not in known]
        if name in NOT_WRITTEN or not (created or written):
            return None
        given = set() if name.endswith("_") else {tensor.untyped_storage()._cdata for tensor in written}
        read = [tensor for tensor in inputs if tensor.untyped_storage()._cdata not in given]
        if flops := count_flops(func, args, kwargs, output):
            kind: OperationKind = "attention" if "attention" in name else "matmul"
            size = sum(map(count_bytes, (*read, *written, *created)))
            dtypes = Counter({tensor.dtype: tensor.numel() for tensor in inputs if tensor.dim() > 1})
            return self._add(kind, func, bytes=size, flops=flops, dtype=max(dtypes, key=dtypes.__getitem__))
        if name in PARTIAL:
            sides = [sum(map(count_bytes, side)) for side in (read, (*written, *created))]
            return self._add("memory", func, bytes=2 * min(sides))
        place = self._find_place()
        if place != self._chain_place or not (self.fused or place[0] == "optimizer"):
            self._end_chain()
            self._chain_place = place
        self._chain.add(read, written, created)
        return None

    def _find_place(self) -> tuple[str, int, bool]:
        phase = self.phase()
        return phase.name, phase.number, torch._C._current_graph_task_id() != -1

    def _add(self, kind: OperationKind, func: Any, **figures: Any) -> None:
        self._end_chain()
        self.operations.append(Operation(kind, str(func), *self._find_place(), **figures))

    def _end_chain(self) -> None:
        if size := self._chain.count_traffic():
            self.operations.append(Operation("memory", "element-wise", *self._chain_place, bytes=size))
        self._chain = Chain()


def list_tensors(values: Any) -> list[Tensor]:
    """The tensors among some values that have memory."""
    return [tensor for tensor in iter_op_tensors(values) if get_device(tensor).type != "meta"]


def count_bytes(tensor: Tensor) -> int:
    """Bytes that an operation on the whole tensor reads or writes; an expanded tensor is read once."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def count_flops(func: Any, args: Sequence[Any], kwargs: dict[str, Any], output: Any) -> float:
    """FLOPs of the products of an operation; 0 if it has none.

    Causal attention has half of the products of the whole matrix of scores; others are counted by torch.
    """
    name = func._schema.name.partition("::")[2]
    if "attention" in name:
        named = {argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)} | kwargs
        return count_attention_flops(named["query"], named["key"], named["value"], named.get("is_causal", False)) * (
            BACKWARD_SHARE if "backward" in name else 1
        )
    if name == "_grouped_mm":
        rows, columns = args[0], args[1]
        if rows.dim() == 3 and columns.dim() == 2:
            return 2.0 * columns.numel() * rows.shape[-2]
        return 2.0 * rows.numel() * columns.shape[-1]
    count = flop_registry.get(func.overloadpacket)
    return 0.0 if count is None else float(count(*args, **kwargs, out_val=output))


def count_attention_flops(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> float:
    """FLOPs of the two products of attention, of queries (..., S, D), keys (..., T, D) and values (..., T, E)."""
    flops = 2.0 * query[..., 0].numel() * key.shape[-2] * (query.shape[-1] + value.shape[-1])
    return flops / 2 if causal else flops
