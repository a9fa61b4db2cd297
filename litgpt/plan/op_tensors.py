"""The tensors among the arguments and the results of operations, found without operations of their own."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

DEVICE_QUERY = torch.ops.prim.device.default


def iter_op_tensors(values: Any) -> Iterator[Tensor]:
    """The tensors in nested tuples, lists and dicts, faster than `tree_leaves` finds them."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, tuple | list):
        for value in values:
            yield from iter_op_tensors(value)
    elif isinstance(values, dict):
        yield from iter_op_tensors(list(values.values()))


def get_device(tensor: Tensor) -> torch.device:
    """The device of a tensor; that of a fake tensor is otherwise an operation, which every mode would see."""
    return getattr(tensor, "fake_device", None) or tensor.device
