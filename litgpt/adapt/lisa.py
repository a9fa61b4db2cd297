"""LISA: of the blocks a few at a time are trained, drawn anew now and then (Pan et al. 2024, arXiv 2403.17919)."""

import torch
from torch import nn

from litgpt.adapt.layers import generator
from litgpt.errors import UserError
from litgpt.model.gpt import GPT
from litgpt.recipe.tuner import LISA


def attach(model: GPT, settings: LISA) -> None:
    """Let everything be trained at some time.

    Raises:
        UserError: if more blocks are asked for than there are.
    """
    if settings.activated_layers > model.config.n_layer:
        raise UserError(
            f"tuner.activated_layers: {settings.activated_layers} of {model.config.n_layer} blocks; "
            f"give at most {model.config.n_layer}"
        )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.endswith(".router.correction"))


class LISASchedule:
    """The blocks of a model, of which some are trained at a time: all alike likely, by the seed and the step alone."""

    def __init__(self, model: GPT, settings: LISA, seed: int) -> None:
        """Note what can be trained of each block of a model that `attach` prepared and that has its layout."""
        self.settings, self.seed = settings, seed
        self.blocks = [[one for one in block.parameters() if one.requires_grad] for block in model.blocks]

    def drawn(self, step: int) -> set[int]:
        """The numbers of the blocks that are trained in a step, counted from 0."""
        turn = step // self.settings.step_interval
        order = torch.randperm(len(self.blocks), generator=generator(f"{self.seed}/lisa/{turn}"))
        return set(order[: self.settings.activated_layers].tolist())

    def turn_to(self, step: int) -> list[nn.Parameter]:
        """Train what is due in a step; returns what was trained until now and is no longer."""
        drawn, left = self.drawn(step), []
        for number, parameters in enumerate(self.blocks):
            for parameter in parameters:
                if parameter.requires_grad and number not in drawn:
                    left.append(parameter)
                parameter.requires_grad_(number in drawn)
        return left
