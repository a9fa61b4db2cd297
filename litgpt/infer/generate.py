"""Write on after a prompt, token by token: read the prompt at once, then one token at a time over a cache."""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from litgpt.errors import UserError
from litgpt.infer.cache import KeyValueCache
from litgpt.infer.sampling import Sampling, choose
from litgpt.model.gpt import GPT, compute_logits


def last_logits(hidden_BTD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, softcap: float | None) -> Tensor:
    """(B, V) scores of the token after the last one only."""
    return compute_logits(hidden_BTD[:, -1:], weight_VD, bias_V, softcap)[:, 0]


def check_room(model: GPT, prompt: Sequence[int], max_new_tokens: int) -> None:
    """Refuse a prompt without tokens, and texts that would grow longer than the model can read."""
    most = model.config.block_size
    if not prompt:
        raise UserError("prompt: has no tokens; give at least one")
    if len(prompt) >= most:
        raise UserError(f"prompt: {len(prompt)} tokens, but the model reads {most} in all; give a shorter one")
    if max_new_tokens < 1 or len(prompt) + max_new_tokens > most:
        raise UserError(
            f"max_new_tokens: {max_new_tokens} after a prompt of {len(prompt)} will not do, for the model reads {most} "
            f"in all; give 1 to {most - len(prompt)}"
        )


@torch.inference_mode()
def generate(
    model: GPT,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    sampling: Sampling,
    stop_tokens: Iterable[int] = (),
    generator: torch.Generator | None = None,
    cache_size: int | None = None,
) -> Iterator[int]:
    """The tokens that follow a prompt, one at a time; a stop token ends them and is not among them.

    Args:
        generator: of random numbers, on the model's device.
        cache_size: tokens that the cache makes room for at once; None: it grows.

    Raises:
        UserError: if the text would be longer than the model or the cache holds, or scores are not numbers.
    """
    check_room(model, prompt, max_new_tokens)
    device, stops = model.embedding.weight.device, set(stop_tokens)
    cache = KeyValueCache(model.config.n_layer, cache_size)
    read = torch.tensor([list(prompt)], device=device)
    for _ in range(max_new_tokens):
        scores = model(read, head=last_logits, cache=cache)
        read = choose_finite(scores, sampling, generator)
        token = int(read)
        if token in stops:
            return
        yield token


def choose_finite(scores_BV: Tensor, sampling: Sampling, generator: torch.Generator | None) -> Tensor:
    """The next token (B, 1).

    Raises:
        UserError: if the model's scores are infinite or not numbers, as float16 makes them where it is too small.
    """
    if not bool(scores_BV.amax().isfinite()):
        raise UserError("the model's scores are not numbers; give precision: 32-true, or check the weights")
    return choose(scores_BV, sampling, generator)


def until(pieces: Iterable[str], stops: Sequence[str]) -> Iterator[str]:
    """The pieces of a text up to the first stop string, of which no part is shown, however it is cut in pieces."""
    held = ""
    for piece in pieces:
        held += piece
        found = [place for stop in stops if (place := held.find(stop)) >= 0]
        shown = min(found) if found else len(held) - beginnings(held, stops)
        if shown:
            yield held[:shown]
        if found:
            return
        held = held[shown:]
    if held:
        yield held


def beginnings(text: str, stops: Sequence[str]) -> int:
    """How many of the last characters of a text may be the beginning of a stop string."""
    sizes = range(min(max(map(len, stops), default=1) - 1, len(text)), 0, -1)
    return next((size for size in sizes if any(stop[size:] and text.endswith(stop[:size]) for stop in stops)), 0)
