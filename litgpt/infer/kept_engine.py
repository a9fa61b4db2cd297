"""The engine that a model keeps between calls, so that later prompts share the prefixes of earlier ones."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from litgpt.errors import UserError
from litgpt.infer.engine import Engine
from litgpt.model.gpt import GPT

CACHE_TOKENS = 32 * 1024  # of all texts whose keys and values are kept between calls, if none of them is longer


class KeptEngine:
    """An engine that is taken for a call and kept after it.

    Args:
        cache_size: the maximum number of tokens whose keys and values are in memory; None for a sufficient number.
        build: builds an engine with the arguments `model` and `cache_tokens`.
    """

    def __init__(self, cache_size: int | None = None, build: Callable[..., Engine] = Engine) -> None:
        self.cache_size, self.build = cache_size, build
        self.engine: Engine | None = None
        self.made_for: tuple[object, ...] = ()

    def __reduce__(self) -> tuple[type["KeptEngine"], tuple[int | None, Callable[..., Engine]]]:
        """Copies and pickles of a model make their own engines."""
        return KeptEngine, (self.cache_size, self.build)

    @contextmanager
    def take(self, model: GPT, *, tokens: int) -> Iterator[Engine]:
        """An engine without work: the kept one, or a new one if that is in use or made for another model.

        Args:
            tokens: the maximum number of tokens of one text whose keys and values are needed.

        Raises:
            UserError: if the text does not fit.
        """
        if self.cache_size is not None and tokens > self.cache_size:
            raise UserError(f"fixed_kv_cache_size: {self.cache_size} is less than {tokens} tokens; set a larger one")
        weight = next(model.parameters())
        made_for = (model, weight.device, weight.dtype)
        engine, self.engine = self.engine, None
        if engine is None or self.made_for != made_for or engine.cache.max_tokens < tokens:
            engine = self.build(model, cache_tokens=self.cache_size or max(CACHE_TOKENS, tokens))
        yield engine
        if not engine.has_work:
            self.engine, self.made_for = engine, made_for
