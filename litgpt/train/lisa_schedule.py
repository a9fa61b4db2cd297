"""Parts of a model that take turns at being trained."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import nn

from litgpt.adapt.lisa import LISASchedule
from litgpt.model.gpt import GPT
from litgpt.parallel.apply import init_mixed_precision, unwrap_model
from litgpt.recipe.tuner import LISA, Tuner


@dataclass(frozen=True)
class Turns:
    """The blocks that take turns, and how a model is laid out again once others of its parameters are trained."""

    blocks: LISASchedule
    wrap: Callable[[nn.Module], nn.Module]

    def turn_to(self, step: int, model: nn.Module, optimizers: Iterable[torch.optim.Optimizer]) -> nn.Module:
        """Train what is due in a step, forget the moments of what no longer is; returns the model, wrapped for it."""
        left = self.blocks.turn_to(step)
        for parameter in left:
            for optimizer in optimizers:
                optimizer.state.pop(parameter, None)
        return self.wrap(unwrap_model(model)) if left else model


def turns_of(tuner: Tuner | None, model: GPT, seed: int, wrap: Callable[[nn.Module], nn.Module]) -> Turns | None:
    """The turns of a tuner that has some, the first of them taken; to be called once the optimizers know everything."""
    if not isinstance(tuner, LISA):
        return None
    init_mixed_precision(model)
    blocks = LISASchedule(model, tuner, seed)
    blocks.turn_to(0)
    return Turns(blocks, wrap)
