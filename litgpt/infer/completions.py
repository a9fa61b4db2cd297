"""The texts after many prompts, each up to one of its stop strings."""

from collections.abc import Iterator, Sequence

from litgpt.data.tokenizer import Tokenizer
from litgpt.infer.engine import Engine
from litgpt.infer.requests import Request


def complete_texts(
    engine: Engine, tokenizer: Tokenizer, requests: Sequence[Request], stops: Sequence[Sequence[str]]
) -> Iterator[tuple[int, str]]:
    """Yield the number and the text of each request as it is finished.

    Args:
        stops: of each request, the strings that end its text and are not part of it.

    Raises:
        UserError: if a request can never fit, or logits are not finite.
    """
    numbers = {engine.submit(request): number for number, request in enumerate(requests)}
    try:
        while numbers:
            for sequence, _ in engine.step():
                number = numbers[sequence]
                tokens = [token.token for token in sequence.tokens if token.finish_reason != "stop"]
                text = tokenizer.decode(tokens)
                ends = [end for stop in stops[number] if (end := text.find(stop)) >= 0]
                if ends:
                    engine.cancel(sequence)
                if ends or sequence.finish_reason is not None:
                    del numbers[sequence]
                    yield number, text[: min(ends, default=len(text))]
    finally:
        for sequence in numbers:
            engine.cancel(sequence)
