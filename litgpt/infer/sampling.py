"""Sample the next token from logits with temperature, top-k and top-p.

Axes: B batch, V vocabulary.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from litgpt.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """How tokens are sampled.

    Attributes:
        temperature: logits are divided by it; 0 selects the most likely token.
        top_k: sample among this many of the most likely tokens; None for all.
        top_p: sample among the most likely tokens whose probabilities sum to this (Holtzman et al. 2020, nucleus
            sampling); 0 selects the most likely token.

    Raises:
        UserError: if one is out of range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UserError(f"temperature: {self.temperature} is not a number of 0 or more; set 0.8, for example")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k: {self.top_k} is less than 1; set 1 or more, or null for every token")
        if not 0 <= self.top_p <= 1:
            raise UserError(f"top_p: {self.top_p} is not a probability; set 0 to 1")

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always selected."""
        return self.temperature == 0 or self.top_p == 0 or self.top_k == 1


class Constraint(Protocol):
    """A grammar that the tokens of one text follow."""

    def allowed(self) -> Tensor:
        """The tokens that may follow, (V,) boolean."""

    def accept(self, token: int) -> None:
        """Continue after this token, which is an allowed one."""


@dataclass(frozen=True)
class SampledRow:
    """What the next token of one text depends on, besides its logits.

    Attributes:
        prompt, generated: the tokens so far; those generated are appended to.
        generator: on the device of the logits; None for torch's default generator.
        constraint: of the tokens that may follow, or None.
    """

    sampling: Sampling
    prompt: Sequence[int]
    generated: list[int]
    generator: torch.Generator | None = None
    constraint: Constraint | None = None


def filter_logits(logits_BV: Tensor, sampling: Sampling) -> Tensor:
    """Logits (B, V) in float32, divided by the temperature; minus infinity for tokens outside top-k and top-p.

    Tokens as likely as the last of the `top_k` are kept. `sampling` is not greedy.
    """
    logits = logits_BV.float()
    logits = (logits - logits.amax(-1, keepdim=True)) / sampling.temperature  # no overflow at low temperatures
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        least = logits.topk(sampling.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    if sampling.top_p < 1:
        ascending, order = logits.sort(-1)
        removed = ascending.softmax(-1).cumsum(-1) <= 1 - sampling.top_p
        removed[:, -1] = False  # the most likely token stays despite rounding
        logits = logits.masked_fill(removed.scatter(-1, order, removed), -math.inf)
    return logits


def sample_token(logits_BV: Tensor, sampling: Sampling, generator: torch.Generator | None = None) -> Tensor:
    """The next token of each row, (B, 1).

    Args:
        generator: on the device of the logits; the same seed gives the same tokens.
    """
    if sampling.greedy:
        return logits_BV.argmax(-1, keepdim=True)
    return torch.multinomial(filter_logits(logits_BV, sampling).softmax(-1), 1, generator=generator)


def sample_finite(logits_BV: Tensor, sampling: Sampling, generator: torch.Generator | None) -> Tensor:
    """As `sample_token`, for logits that may have overflowed.

    Raises:
        UserError: if the largest logit is infinite or not a number, for example in float16.
    """
    if not bool(logits_BV.amax().isfinite()):
        raise UserError("the model's logits are not finite; set precision: 32-true, or check the weights")
    return sample_token(logits_BV, sampling, generator)


def sample_rows(logits_RV: Tensor, rows: Sequence[SampledRow]) -> Tensor:
    """The next token of each of several texts, (R,).

    Raises:
        UserError: as `sample_finite`.
    """
    if all(row.sampling.greedy and row.constraint is None for row in rows):
        return sample_finite(logits_RV, rows[0].sampling, None)[:, 0]
    tokens = []
    for logits_V, row in zip(logits_RV, rows, strict=True):
        if row.constraint is not None:
            logits_V = logits_V.masked_fill(~row.constraint.allowed(), -math.inf)
        tokens.append(sample_finite(logits_V[None], row.sampling, row.generator)[0])
    return torch.cat(tokens)
