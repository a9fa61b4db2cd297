"""What an engine is asked for, and what it answers."""

from dataclasses import dataclass, field
from typing import Literal

from litgpt.infer.sampling import Constraint, Sampling

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class Request:
    """A prompt and how to continue it.

    Attributes:
        prompt: token ids, one or more.
        max_new_tokens: the maximum number of tokens to generate.
        stop_tokens: tokens after which nothing is generated.
        seed: of this text's random numbers, which then do not depend on other requests; None for torch's generator.
        logprobs: report the log-probability of each token, and this many of the most likely ones; None for neither.
        prompt_logprobs: the same for the tokens of the prompt, except the first.
        constraint: a grammar; None for any text.
    """

    prompt: tuple[int, ...]
    max_new_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    stop_tokens: frozenset[int] = frozenset()
    seed: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    constraint: Constraint | None = None


@dataclass(frozen=True)
class GeneratedToken:
    """One token of an answer, or of a prompt.

    Attributes:
        logprob: the logarithm of its probability without temperature or other settings, or None if not asked for.
        top: (token, log-probability) of the most likely tokens, the most likely first.
        finish_reason: why it is the last; None for others. A stop token is reported too, with `stop`.
    """

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    finish_reason: FinishReason | None = None
