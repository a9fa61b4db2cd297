"""The perplexity of a text, of which each token is scored once, after as many tokens as a window holds."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from litgpt.errors import UserError
from litgpt.infer.likelihood import Continuation, compute_likelihoods
from litgpt.model.gpt import GPT
from litgpt.phases import phase


@dataclass(frozen=True)
class Perplexity:
    """How well a model predicts a text.

    Attributes:
        bits_per_byte: the negative logarithm to base 2 of the text's probability, per byte of UTF-8.
        token_perplexity: the exponential of the mean loss of its tokens; depends on the tokenizer.
    """

    bits_per_byte: float
    token_perplexity: float
    tokens: int
    byte_count: int
    window: int
    stride: int


def iter_windows(ids: Sequence[int], first: int, *, size: int, stride: int) -> Iterator[Continuation]:
    """Yield windows over a text, whose continuations are all of its tokens, each once.

    The first window scores `size` tokens, each later one `stride` tokens, after `size + 1 - stride` tokens of context.

    Args:
        first: the token before the text.
        size: the maximum number of tokens that the model sees.
    """
    text, end = (first, *ids), min(size, len(ids))
    if ids:
        yield Continuation(text[:1], text[1 : end + 1])
    while end < len(ids):
        start, end = end + 1, min(end + stride, len(ids))
        yield Continuation(text[max(0, end - size) : start], text[start : end + 1])


def compute_perplexity(
    model: GPT,
    ids: Sequence[int],
    first: int,
    *,
    byte_count: int,
    window: int | None = None,
    stride: int | None = None,
) -> Perplexity:
    """The perplexity of a text.

    Args:
        ids: its tokens.
        first: the token before it, which is not scored.
        byte_count: its number of bytes in UTF-8.
        window: the maximum number of tokens that the model sees; None for its context.
        stride: the number of tokens by which the window moves; None for half of it.

    Raises:
        UserError: if the text is empty, or the window is longer than the model's context.
    """
    limit = model.config.block_size
    window = window or limit
    stride = stride or max(1, window // 2)
    if window > limit:
        raise UserError(f"window: {window} exceeds the model's context; set at most {limit}")
    if stride > window:
        raise UserError(f"stride: {stride} exceeds window: {window}, which would skip tokens; set at most {window}")
    if not ids:
        raise UserError("text: has no tokens; give a file with text")
    windows = list(iter_windows(ids, first, size=window, stride=stride))
    nats = 0.0
    with phase("scoring the text", len(ids)) as entry:
        for number, likelihood in compute_likelihoods(model, windows):
            nats -= likelihood.logprob
            entry.advance(len(windows[number].tokens))
    mean = nats / len(ids)
    perplexity = math.exp(mean) if mean < 700 else math.inf
    return Perplexity(nats / math.log(2) / byte_count, perplexity, len(ids), byte_count, window, stride)
