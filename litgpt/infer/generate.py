"""Generate text with a key-value cache: the prompt is processed in one pass, then one token at a time."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import takewhile

import torch
from torch import Tensor

from litgpt.errors import UserError
from litgpt.infer.sampling import Sampling, sample_finite
from litgpt.model.generation import generate_tokens
from litgpt.model.gpt import GPT, compute_logits
from litgpt.model.kv_cache import KeyValueCache


def compute_next_logits(hidden_BTD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, softcap: float | None) -> Tensor:
    """Logits (B, V) of the last position only."""
    return compute_logits(hidden_BTD[:, -1:], weight_VD, bias_V, softcap)[:, 0]


def check_tokens(key: str, tokens: tuple[int, int], rows: int) -> None:
    """Check that a model with this number of tokens has the smallest and the largest of some token ids.

    Raises:
        UserError: naming the key of the ids and the first of the two that it does not have.
    """
    for token in tokens:
        if not 0 <= token < rows:
            raise UserError(f"{key}: has token {token}, but the model has {rows} tokens; use the model's own tokenizer")


def check_prompt(model: GPT, prompt: Sequence[int], max_new_tokens: int) -> None:
    """Check that prompt and new tokens fit into the model's context, and the model has all tokens of the prompt.

    Raises:
        UserError: if they do not, the prompt is empty, or the model is a reward model.
    """
    if model.config.output == "score":
        raise UserError(
            f"{model.config.name}: a reward model computes scores, not text; generate with a language model"
        )
    limit, rows = model.config.block_size, model.config.padded_vocab_size or 0
    if not prompt:
        raise UserError("prompt: has no tokens; set at least one")
    check_tokens("prompt", (min(prompt), max(prompt)), rows)
    if len(prompt) >= limit:
        raise UserError(f"prompt: {len(prompt)} tokens exceed the model's context of {limit}; use a shorter one")
    if max_new_tokens < 1 or len(prompt) + max_new_tokens > limit:
        raise UserError(
            f"max_new_tokens: {max_new_tokens} after a prompt of {len(prompt)} tokens exceeds the model's context "
            f"of {limit}; set 1 to {limit - len(prompt)}"
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
    """Yield the tokens that follow a prompt, up to a stop token, which is not yielded.

    Args:
        generator: on the model's device.
        cache_size: number of tokens to allocate the cache for; None for a cache that grows.

    Raises:
        UserError: if the text would exceed the model's context or the cache, or logits are not finite.
    """
    check_prompt(model, prompt, max_new_tokens)
    device, stops = model.embedding.weight.device, set(stop_tokens)
    cache = KeyValueCache(model.config.n_layer, cache_size)

    def next_token(ids: list[int]) -> int:
        new_ids = torch.tensor([ids[cache.length :]], device=device)
        return int(sample_finite(model(new_ids, head=compute_next_logits, cache=cache), sampling, generator))

    tokens = generate_tokens(next_token, prompt, max_new_tokens=max_new_tokens, stop_tokens=stops)
    yield from takewhile(lambda token: token not in stops, tokens)


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
