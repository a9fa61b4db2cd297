"""Sample the next token of each of several texts from its logits.

The settings of a text are applied in this order, which is that of transformers: logit bias, repetition penalty,
presence and frequency penalties, constraint, temperature, top-k, top-p, min-p.

Axes: R texts, V vocabulary.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from litgpt.errors import UserError

NUCLEUS_TOKENS = 1024
"""The number of tokens among which those of top-p are looked for first."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are sampled.

    Attributes:
        temperature: logits are divided by it; 0 selects the most likely token.
        top_k: sample among this many of the most likely tokens; None for all.
        top_p: sample among the most likely tokens whose probabilities sum to this (Holtzman et al. 2020, nucleus
            sampling); 0 selects the most likely token.
        min_p: sample among the tokens whose probability is at least this share of the largest (Nguyen et al. 2024).
        repetition_penalty: positive logits of tokens of the prompt and the text are divided by it, negative ones
            multiplied (Keskar et al. 2019); 1 for none.
        presence_penalty: subtracted from the logit of each token of the text, as in OpenAI's API.
        frequency_penalty: subtracted from the logit of a token for each time it is in the text, as in OpenAI's API.
        logit_bias: added to the logits of these tokens.

    Raises:
        UserError: if one is out of range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UserError(f"temperature: {self.temperature} is not a number of 0 or more; set 0.8, for example")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k: {self.top_k} is less than 1; set 1 or more, or null for every token")
        for key in ("top_p", "min_p"):
            if not 0 <= (value := getattr(self, key)) <= 1:
                raise UserError(f"{key}: {value} is not a probability; set 0 to 1")
        if not (math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0):
            raise UserError(f"repetition_penalty: {self.repetition_penalty} is not more than 0; set 1.1, for example")
        for key in ("presence_penalty", "frequency_penalty"):
            if not -2 <= (value := getattr(self, key)) <= 2:
                raise UserError(f"{key}: {value} is not between -2 and 2; set 0.5, for example")
        for token, bias in self.logit_bias.items():
            if not math.isfinite(bias):
                raise UserError(f"logit_bias: {bias} for token {token} is not finite; set -100 to exclude a token")

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always selected."""
        return self.temperature == 0 or self.top_p == 0 or self.top_k == 1

    @property
    def adjusts_logits(self) -> bool:
        """Whether logits depend on the text or on a bias, before temperature."""
        return bool(self.logit_bias or self.repetition_penalty != 1 or self.presence_penalty or self.frequency_penalty)


class Constraint(Protocol):
    """A grammar that the tokens of one text follow."""

    def allowed(self) -> Tensor:
        """The tokens that may follow, (V,) boolean; at least one."""

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


def sample_rows(logits_RV: Tensor, rows: Sequence[SampledRow]) -> Tensor:
    """The next token of each of several texts, (R,).

    The token of a text with a generator depends on its own logits and settings only, not on the other texts.

    Raises:
        UserError: as `check_finite`.
    """
    best_R, tokens_R = logits_RV.max(-1)  # argmax takes four times as long in bfloat16
    check_finite(best_R)
    if any(row.sampling.adjusts_logits or row.constraint is not None for row in rows):
        logits_RV = adjust_logits(logits_RV, rows)
        tokens_R = logits_RV.max(-1).indices
    drawn = [index for index, row in enumerate(rows) if not row.sampling.greedy]
    if drawn:
        filtered = filter_logits(logits_RV[drawn], [rows[index].sampling for index in drawn])
        tokens_R[drawn] = draw_tokens(filtered, [rows[index].generator for index in drawn])
    return tokens_R


def check_finite(best_R: Tensor) -> None:
    """Check that the largest logit of each text is a finite number.

    Raises:
        UserError: if not, for example in float16.
    """
    if not bool(best_R.isfinite().all()):
        raise UserError("the model's logits are not finite; set precision: 32-true, or check the weights")


def compute_probabilities(logits_RV: Tensor, rows: Sequence[SampledRow]) -> Tensor:
    """The probabilities (R, V) that `sample_rows` draws from; of a greedy text, 1 for its most likely token.

    Raises:
        UserError: as `check_finite`.
    """
    check_finite(logits_RV.amax(-1))
    if any(row.sampling.adjusts_logits or row.constraint is not None for row in rows):
        logits_RV = adjust_logits(logits_RV, rows)
    best_RV = torch.zeros_like(logits_RV, dtype=torch.promote_types(logits_RV.dtype, torch.float32))
    best_RV.scatter_(-1, logits_RV.argmax(-1, keepdim=True), 1.0)
    drawn = [index for index, row in enumerate(rows) if not row.sampling.greedy]
    if drawn:
        best_RV[drawn] = filter_logits(logits_RV[drawn], [rows[index].sampling for index in drawn]).softmax(-1)
    return best_RV


def adjust_logits(logits_RV: Tensor, rows: Sequence[SampledRow]) -> Tensor:
    """Logits (R, V), at least in float32, after bias and penalties; minus infinity for tokens that may not follow."""
    logits_RV = logits_RV.to(torch.promote_types(logits_RV.dtype, torch.float32), copy=True)
    for logits_V, row in zip(logits_RV, rows, strict=True):
        sampling = row.sampling
        if sampling.logit_bias:
            logits_V[list(sampling.logit_bias)] += logits_V.new_tensor(list(sampling.logit_bias.values()))
        if sampling.repetition_penalty != 1:
            seen = torch.tensor(sorted({*row.prompt, *row.generated}), device=logits_V.device)
            scores = logits_V[seen]
            penalty = sampling.repetition_penalty
            logits_V[seen] = torch.where(scores < 0, scores * penalty, scores / penalty)
        if (sampling.presence_penalty or sampling.frequency_penalty) and row.generated:
            counts = Counter(row.generated)
            costs = [sampling.presence_penalty + sampling.frequency_penalty * count for count in counts.values()]
            logits_V[list(counts)] -= logits_V.new_tensor(costs)
        if row.constraint is not None:
            logits_V.masked_fill_(~row.constraint.allowed().to(logits_V.device), -math.inf)
    return logits_RV


def filter_logits(logits_RV: Tensor, samplings: Sequence[Sampling]) -> Tensor:
    """Logits (R, V), at least in float32, divided by the temperature; minus infinity for tokens that are not kept.

    Tokens as likely as the last of the `top_k` are kept. No sampling is greedy.
    """
    logits_RV = logits_RV.to(torch.promote_types(logits_RV.dtype, torch.float32))
    temperatures = logits_RV.new_tensor([sampling.temperature for sampling in samplings])[:, None]
    logits_RV = (logits_RV - logits_RV.amax(-1, keepdim=True)) / temperatures  # no overflow at low temperatures
    numbers = [min(sampling.top_k or logits_RV.shape[-1], logits_RV.shape[-1]) for sampling in samplings]
    if limited := [index for index, number in enumerate(numbers) if number < logits_RV.shape[-1]]:
        last = torch.tensor([numbers[index] - 1 for index in limited], device=logits_RV.device)[:, None]
        chosen = logits_RV[limited]
        least = chosen.topk(int(max(numbers[index] for index in limited))).values.gather(-1, last)
        logits_RV[limited] = chosen.masked_fill(chosen < least, -math.inf)
    if limited := [index for index, sampling in enumerate(samplings) if sampling.top_p < 1]:
        shares = torch.tensor([samplings[index].top_p for index in limited], dtype=torch.float64)[:, None]
        logits_RV[limited] = keep_nucleus(logits_RV[limited], shares)
    if any(sampling.min_p for sampling in samplings):
        shares = logits_RV.new_tensor([sampling.min_p for sampling in samplings])[:, None]
        logits_RV.masked_fill_(logits_RV < shares.log(), -math.inf)  # the largest logit is 0
    return logits_RV


def keep_nucleus(logits_RV: Tensor, top_p_R1: Tensor) -> Tensor:
    """Logits (R, V), with minus infinity for all but the most likely tokens whose probabilities sum to `top_p`.

    Args:
        top_p_R1: float64 on the CPU, since 1 - p is rounded to float32 only at the end.
    """
    if logits_RV.shape[-1] > NUCLEUS_TOKENS:  # sorting all tokens takes most of the time of a step
        values, order = logits_RV.softmax(-1).topk(NUCLEUS_TOKENS)
        kept = values.cumsum(-1) - values < top_p_R1.to(values)
        kept[:, 0] = True
        result = torch.full_like(logits_RV, -math.inf)
        result.scatter_(-1, order, logits_RV.gather(-1, order).masked_fill(~kept, -math.inf))
        larger = kept[:, -1].nonzero()[:, 0]
        if len(larger):
            result[larger] = sort_nucleus(logits_RV[larger], top_p_R1[larger.cpu()])
        return result
    return sort_nucleus(logits_RV, top_p_R1)


def sort_nucleus(logits_RV: Tensor, top_p_R1: Tensor) -> Tensor:
    """As `keep_nucleus`, for any number of tokens in the nucleus."""
    ascending, order = logits_RV.sort(-1)
    removed = ascending.softmax(-1).cumsum(-1) <= (1 - top_p_R1).to(ascending)
    removed[:, -1] = False  # the most likely token stays despite rounding
    return logits_RV.masked_fill(removed.scatter(-1, order, removed), -math.inf)


def draw_tokens(logits_RV: Tensor, generators: Sequence[torch.Generator | None]) -> Tensor:
    """One token of each row, (R,), with the probabilities of its logits: one random number for each."""
    dtype = torch.float32 if logits_RV.device.type == "mps" else torch.float64  # sums over V round in float32
    numbers_R = torch.empty(len(generators), dtype=dtype, device=logits_RV.device)
    for number, generator in zip(numbers_R, generators, strict=True):
        number.uniform_(generator=generator)
    sums_RV = logits_RV.softmax(-1).to(dtype).cumsum(-1)
    totals_R = sums_RV[:, -1]
    points_R = torch.minimum(numbers_R * totals_R, totals_R.nextafter(torch.zeros_like(totals_R)))
    return torch.searchsorted(sums_RV, points_R[:, None], right=True)[:, 0]
