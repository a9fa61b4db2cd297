"""The text after one prompt, and where it ends."""

from collections.abc import Callable, Iterable, Iterator, Sequence

from litgpt.data.tokenizer import StreamDecoder, Tokenizer
from litgpt.infer.kept_engine import KeptEngine
from litgpt.infer.requests import GeneratedToken, Request
from litgpt.model.gpt import GPT


def generate(kept: KeptEngine, model: GPT, request: Request) -> Iterator[int]:
    """Yield the tokens that follow a prompt, up to a stop token, which is not yielded.

    Raises:
        UserError: if the text would exceed the model's context or the cache, or logits are not finite.
    """
    with kept.take(model, tokens=request.cached_tokens) as engine:
        for token in engine.stream(request):
            if token.finish_reason != "stop":
                yield token.token


def call_with_each(tokens: Iterable[int], callback: Callable[[int], object]) -> Iterator[int]:
    """Yield the same tokens, after a call of `callback` with each."""
    for token in tokens:
        callback(token)
        yield token


def truncate_tokens(
    tokens: Iterable[int], stops: Sequence[str], tokenizer: Tokenizer, *, context: Sequence[int]
) -> Iterator[int]:
    """Yield the tokens up to the one that completes a stop string.

    Args:
        context: the tokens before them, as in `Tokenizer.decode_stream`.
    """
    decoded: list[int] = []
    yielded = 0
    recorded = call_with_each(tokens, decoded.append)
    for _ in truncate_at_stop(tokenizer.decode_stream(recorded, context=context), stops):
        yield from decoded[yielded:]
        yielded = len(decoded)
    yield from decoded[yielded:]


class StopTruncator:
    """Passes on the pieces of a text up to the first stop string, no part of which is passed on, however it is split.

    Attributes:
        is_done: whether a stop string was found.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops, self._pending, self.is_done = stops, "", False

    def push(self, piece: str) -> str:
        """The text that cannot be the beginning of a stop string, after one more piece."""
        if self.is_done:
            return ""
        self._pending += piece
        starts = [start for stop in self._stops if (start := self._pending.find(stop)) >= 0]
        self.is_done = bool(starts)
        safe = min(starts) if starts else len(self._pending) - count_partial_stop(self._pending, self._stops)
        text, self._pending = self._pending[:safe], "" if starts else self._pending[safe:]
        return text

    def finish(self) -> str:
        """The text that is left after the last piece."""
        return self._pending


class TextStream:
    """The text of tokens as they arrive, up to a stop string.

    Args:
        context: the tokens that the text continues; none for a separate text.
    """

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int], stops: Sequence[str]) -> None:
        self._decoder, self._truncator = StreamDecoder(tokenizer, context), StopTruncator(stops)

    @property
    def has_stop(self) -> bool:
        """Whether a stop string was found."""
        return self._truncator.is_done

    def push(self, token: GeneratedToken) -> str:
        """The text that one more token completes; a stop token has none."""
        piece = "" if token.finish_reason == "stop" else self._decoder.push(token.token)
        if token.finish_reason is None:
            return self._truncator.push(piece)
        text = self._truncator.push(piece + self._decoder.finish())
        return text if self.has_stop else text + self._truncator.finish()


def truncate_at_stop(pieces: Iterable[str], stops: Sequence[str]) -> Iterator[str]:
    """Yield the pieces of a text up to the first stop string, no part of which is yielded, however it is split."""
    truncator = StopTruncator(stops)
    for piece in pieces:
        if text := truncator.push(piece):
            yield text
        if truncator.is_done:
            return
    if text := truncator.finish():
        yield text


def count_partial_stop(text: str, stops: Sequence[str]) -> int:
    """The number of last characters of a text that may be the beginning of a stop string."""
    sizes = range(min(max(map(len, stops), default=1) - 1, len(text)), 0, -1)
    return next((size for size in sizes if any(stop[size:] and text.endswith(stop[:size]) for stop in stops)), 0)
