"""The text after one prompt, and where it ends."""

from collections.abc import Iterable, Iterator, Sequence

from litgpt.errors import UserError
from litgpt.infer.engine import Engine
from litgpt.infer.requests import Request, check_prompt
from litgpt.infer.sampling import Constraint, Sampling
from litgpt.model.gpt import GPT


def generate(
    model: GPT,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    sampling: Sampling,
    stop_tokens: Iterable[int] = (),
    seed: int | None = None,
    cache_size: int | None = None,
    constraint: Constraint | None = None,
) -> Iterator[int]:
    """Yield the tokens that follow a prompt, up to a stop token, which is not yielded.

    Args:
        seed: of the random numbers; None to use torch's default generator.
        cache_size: the maximum number of tokens whose keys and values are in memory; None for the model's context.
        constraint: of the tokens that may follow; None for any.

    Raises:
        UserError: if the text would exceed the model's context or the cache, or logits are not finite.
    """
    request = Request(tuple(prompt), max_new_tokens, sampling, frozenset(stop_tokens), seed, constraint=constraint)
    check_prompt(model, request.prompt, max_new_tokens)
    if cache_size is not None and request.cached_tokens > cache_size:
        raise UserError(
            f"fixed_kv_cache_size: {cache_size} is less than {request.cached_tokens} tokens; set a larger one"
        )
    for token in Engine(model, max_sequences=1, cache_tokens=cache_size).stream(request):
        if token.finish_reason != "stop":
            yield token.token


def truncate_at_stop(pieces: Iterable[str], stops: Sequence[str]) -> Iterator[str]:
    """Yield the pieces of a text up to the first stop string, no part of which is yielded, however it is split."""
    pending = ""
    for piece in pieces:
        pending += piece
        starts = [start for stop in stops if (start := pending.find(stop)) >= 0]
        safe = min(starts) if starts else len(pending) - count_partial_stop(pending, stops)
        if safe:
            yield pending[:safe]
        if starts:
            return
        pending = pending[safe:]
    if pending:
        yield pending


def count_partial_stop(text: str, stops: Sequence[str]) -> int:
    """The number of last characters of a text that may be the beginning of a stop string."""
    sizes = range(min(max(map(len, stops), default=1) - 1, len(text)), 0, -1)
    return next((size for size in sizes if any(stop[size:] and text.endswith(stop[:size]) for stop in stops)), 0)
