"""DTensor computes the whole shape of a result on fake tensors, which are no part of the program that runs."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.utils._python_dispatch import _disable_current_modes


@contextmanager
def hidden_shape_propagation() -> Iterator[None]:
    """The context in which modes, such as those that count memory, do not see these fake tensors of the whole shape."""
    propagate = ShardingPropagator._propagate_tensor_meta_non_cached

    def propagate_without_modes(propagator: ShardingPropagator, schema: Any) -> Any:
        with _disable_current_modes():
            return propagate(propagator, schema)

    with patch.object(ShardingPropagator, propagate.__name__, propagate_without_modes):
        yield
