"""What a tuner does in each optimizer step, beside the step itself."""

from collections.abc import Sequence

import torch
from torch import nn

from litgpt.model.init import Writer


class TunerSchedule:
    """The changes that a tuner makes around an optimizer step; nothing, unless a subclass overrides a method.

    All ranks call the methods together, and the model has its parallel layout when an object is created.
    """

    def begin_step(self, _step: int) -> list[nn.Parameter]:
        """Prepare the model for a step, counted from 0; returns the parameters that became frozen."""
        return []

    def add_gradients(self, _write: Writer) -> None:
        """Add the gradients of losses that depend on the parameters alone, once the other gradients are complete.

        Args:
            _write: stores a full value into a tensor, which may be sharded.
        """

    def end_step(self, _optimizers: Sequence[torch.optim.Optimizer], _write: Writer) -> dict[str, float]:
        """Change the parameters after a step, before their gradients are dropped; returns metrics, equal on all ranks.

        What a checkpoint must hold is kept in the state of the optimizers, under keys that begin with `tuner_`.
        """
        return {}
