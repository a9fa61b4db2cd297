"""LISA: a few blocks are trained at a time and redrawn at an interval (Pan et al. 2024, arXiv 2403.17919)."""

import torch
from torch import nn

from litgpt.adapt.schedule import TunerSchedule
from litgpt.errors import UserError
from litgpt.model.gpt import GPT
from litgpt.model.init import seeded_generator
from litgpt.recipe.tuner import LISA


def check_lisa(model: GPT, settings: LISA) -> None:
    """Check that the model has as many blocks as are trained at a time; all of its parameters stay trainable.

    Raises:
        UserError: if it has fewer.
    """
    if settings.activated_layers > model.config.n_layer:
        raise UserError(
            f"tuner.activated_layers: {settings.activated_layers} of {model.config.n_layer} blocks; "
            f"set at most {model.config.n_layer}"
        )


class LISASchedule(TunerSchedule):
    """The blocks of a model that are trained in each step, drawn uniformly as a function of seed and step only."""

    def __init__(self, model: GPT, settings: LISA, seed: int) -> None:
        """Record the trainable parameters of each layer; the model already has its parallel layout.

        Prediction layers are trained in every step, as embedding and head are.
        """
        self.settings, self.seed = settings, seed
        layers = model.blocks[: model.config.n_layer]
        self.blocks = [[p for p in block.parameters() if p.requires_grad] for block in layers]

    def draw_blocks(self, step: int) -> set[int]:
        """The indices of the blocks that are trained in a step."""
        interval = step // self.settings.step_interval
        order = torch.randperm(len(self.blocks), generator=seeded_generator(f"{self.seed}/lisa/{interval}"))
        return set(order[: self.settings.activated_layers].tolist())

    def begin_step(self, step: int) -> list[nn.Parameter]:
        """Make the blocks of a step trainable and freeze the others; returns the parameters that became frozen."""
        active, frozen = self.draw_blocks(step), []
        for number, parameters in enumerate(self.blocks):
            for parameter in parameters:
                if parameter.requires_grad and number not in active:
                    frozen.append(parameter)
                parameter.requires_grad_(number in active)
        return frozen
