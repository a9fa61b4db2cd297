"""The loop that generates tokens, for samples during training and for inference."""

from collections.abc import Callable, Collection, Iterator, Sequence


def generate_tokens(
    next_token: Callable[[list[int]], int],
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    stop_tokens: Collection[int] = (),
) -> Iterator[int]:
    """Yield the tokens that follow a prompt, up to and including the first stop token.

    Args:
        next_token: chooses a token, given the prompt and the tokens so far.
    """
    ids = list(prompt)
    for _ in range(max_new_tokens):
        ids.append(next_token(ids))
        yield ids[-1]
        if ids[-1] in stop_tokens:
            return
