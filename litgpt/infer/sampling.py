"""Choose the next token from a model's scores: temperature, the likeliest few, or the likeliest share.

Axes: B batch, V vocabulary.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from litgpt.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        temperature: scores are divided by it; 0 takes the likeliest token.
        top_k: only so many of the likeliest tokens; None for all.
        top_p: only the likeliest tokens that together have this probability (Holtzman et al. 2020, nucleus sampling);
            0 takes the likeliest token.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UserError(f"temperature: {self.temperature} will not do; give 0 or more, such as 0.8")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k: {self.top_k} will not do; give 1 or more, or null for every token")
        if not 0 <= self.top_p <= 1:
            raise UserError(f"top_p: {self.top_p} will not do; give a share from 0 to 1")

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken always."""
        return self.temperature == 0 or self.top_p == 0 or self.top_k == 1


def candidates(logits_BV: Tensor, sampling: Sampling) -> Tensor:
    """Scores (B, V) in float32, divided by the temperature; minus infinity for the tokens that are left out.

    Tokens as likely as the last of the `top_k` are kept with it. `sampling` is not greedy.
    """
    scores = logits_BV.float()
    scores = (scores - scores.amax(-1, keepdim=True)) / sampling.temperature  # no overflow, however cold
    if sampling.top_k is not None and sampling.top_k < scores.shape[-1]:
        least = scores.topk(sampling.top_k).values[:, -1:]
        scores = scores.masked_fill(scores < least, -math.inf)
    if sampling.top_p < 1:
        ascending, order = scores.sort(-1)
        out = ascending.softmax(-1).cumsum(-1) <= 1 - sampling.top_p
        out[:, -1] = False  # the likeliest stays whatever rounding says
        scores = scores.masked_fill(out.scatter(-1, order, out), -math.inf)
    return scores


def choose(logits_BV: Tensor, sampling: Sampling, generator: torch.Generator | None = None) -> Tensor:
    """The next token of each row, (B, 1).

    Args:
        generator: of random numbers, on the device of the scores; the same seed gives the same tokens.
    """
    if sampling.greedy:
        return logits_BV.argmax(-1, keepdim=True)
    return torch.multinomial(candidates(logits_BV, sampling).softmax(-1), 1, generator=generator)
