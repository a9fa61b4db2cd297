"""Run code on tensors without memory: shapes and types are computed, values are not."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._ops import HigherOrderOperator
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass_type
from torch.utils.weak import WeakTensorKeyDictionary

from litgpt.plan.op_tensors import iter_op_tensors

aten = torch.ops.aten
SCALAR_READS = (aten.item.default, aten._local_scalar_dense.default)
INDEXED = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default)
"""Operations whose second argument is a list of indices, each for a dimension, or masks, each for its dimensions."""


class KnownValues(TorchFunctionMode):
    """Keeps the numbers of which the host makes tensors.

    Attributes:
        values: a number or a list of numbers, by tensor.
    """

    def __init__(self) -> None:
        super().__init__()
        self.values = WeakTensorKeyDictionary()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a function of torch, and keep the argument of `torch.tensor`."""
        output = func(*args, **(kwargs or {}))
        if func is torch.tensor and output.dim() <= 1:
            self.values[output] = args[0]
        return output


class HostReads(TorchDispatchMode):
    """Answers what the host reads from fake tensors.

    Numbers that the host has sent to the device are read back as they are, also after a sum over ranks: the other ranks
    are taken to add nothing. A number that the device computed reads as 1, and True for a bool, so a gradient norm is
    finite and nothing is skipped. `nonzero` and masks select all elements, so every label is taken to be a target.
    `bincount` returns as many numbers as it is asked for at least. Operations on real tensors, such as the ranks of a
    mesh, are computed.
    """

    supports_higher_order_operators = True

    def __init__(self, known: KnownValues) -> None:
        super().__init__()
        self.known = known.values

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, with answers for the operations whose results depend on values."""
        if any(map(is_traceable_wrapper_subclass_type, types)):
            return NotImplemented  # its own operations on plain tensors come here
        if func is not aten.lift_fresh.default and is_real((args, kwargs)):
            with unset_fake_temporarily():
                return func(*args, **(kwargs or {}))
        if func is aten.nonzero.default:
            return args[0].new_empty((args[0].numel(), args[0].dim()), dtype=torch.long)
        if func is aten.masked_scatter_backward.default:
            return args[0].new_empty(args[2])
        if func is aten.bincount.default:
            return args[0].new_empty(kwargs["minlength"] if len(args) < 3 else args[2])
        if func in SCALAR_READS:
            return self._read(args[0])
        if func in INDEXED:
            args = (args[0], [part for index in args[1] for part in select_all(index)], *args[2:])
        output = func(*args, **(kwargs or {}))
        if isinstance(func, HigherOrderOperator):
            return output  # which has no schema, and changes none of its arguments
        if func is aten.unbind.int and args[0] in self.known:
            self.known.update(zip(output, self.known[args[0]], strict=True))
        elif func._schema.is_mutable and func.namespace != "c10d":
            for tensor in iter_op_tensors((args, kwargs)):
                self.known.pop(tensor, None)
        return output

    def _read(self, tensor: Tensor) -> Any:
        if tensor in self.known:
            return self.known[tensor]
        return read_computed(tensor)


def read_computed(tensor: Tensor) -> bool | float:
    """What a number that the device computed reads as."""
    return tensor.dtype == torch.bool or (1.0 if tensor.is_floating_point() else 1)


def read_list(tensor: Tensor, known: WeakTensorKeyDictionary) -> Any:
    """As `FakeTensor.tolist`, with one read instead of an operation for each element."""
    if not tensor.numel():
        return build_list(tensor.shape, 0)
    value = tensor.reshape(-1)[0].item()
    return list(known[tensor]) if tensor.dim() and tensor in known else build_list(tensor.shape, value)


def build_list(shape: Sequence[int], value: float) -> Any:
    """Nested lists with the same value for each element of a tensor."""
    return [build_list(shape[1:], value) for _ in range(shape[0])] if shape else value


def select_all(index: Tensor | None) -> Iterator[Tensor | None]:
    """The indices, one for each dimension, of all elements that a mask may select; others as they are."""
    if index is None or index.dtype not in (torch.bool, torch.uint8):
        yield index
        return
    for _ in range(index.dim()):
        yield index.new_empty(index.numel(), dtype=torch.long)


def is_real(values: Any) -> bool:
    """Whether the tensors among some values, of which there is one, have values of their own."""
    tensors = list(iter_op_tensors(values))
    return bool(tensors) and all(type(tensor) is not FakeTensor and tensor.device.type == "cpu" for tensor in tensors)


@contextmanager
def fake_tensors() -> Iterator[None]:
    """The context in which new tensors are fake.

    Tensors on the meta device, such as those of a model without memory, may be arguments of operations.
    """
    known = KnownValues()
    faster = patch.object(FakeTensor, "tolist", lambda tensor: read_list(tensor, known.values))
    with FakeTensorMode(allow_non_fake_inputs=True), HostReads(known), known, faster:
        yield
