"""The text after a prompt, as a whole or in pieces; and the texts after a list of prompts."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from litgpt.data.tokenizer import Tokenizer
from litgpt.errors import UserError
from litgpt.infer.generate import call_with_each, generate, truncate_at_stop, truncate_tokens
from litgpt.infer.kept_engine import KeptEngine
from litgpt.infer.prompt_files import WrittenText, generate_texts
from litgpt.infer.prompt_images import Prompt
from litgpt.infer.requests import check_prompt
from litgpt.infer.text_settings import TextSettings
from litgpt.model.gpt import GPT


def generate_text(
    kept: KeptEngine,
    model: GPT,
    tokenizer: Tokenizer,
    prompt: Prompt,
    settings: TextSettings,
    *,
    seed: int | None,
    as_token_ids: bool = False,
    stream: bool = False,
    on_token: Callable[[int], object] | None = None,
) -> Any:
    """The text after a prompt, its tokens (T,) in int64, or an iterator over one of them; as in `LLM.generate`.

    Raises:
        UserError: if the text would exceed the model's context or the cache, or logits are not finite.
    """
    check_prompt(model, prompt.ids, settings.max_new_tokens, has_images=bool(prompt.media))
    tokens = generate(kept, model, settings.build_request(prompt, seed))
    tokens = call_with_each(tokens, on_token) if on_token else tokens
    # a reply is a separate text; a continuation may begin with the space after the prompt
    context, stops = prompt.ids if settings.continues else (), settings.stops
    if as_token_ids:
        tokens = truncate_tokens(tokens, stops, tokenizer, context=context) if stops else tokens
        return tokens if stream else torch.tensor(list(tokens), dtype=torch.int64)
    text = truncate_at_stop(tokenizer.decode_stream(tokens, context=context), stops)
    return text if stream else "".join(text)


def refuse_with_list(**settings: object) -> None:
    """Check that settings for a single prompt are not set.

    Raises:
        UserError: naming the first that is.
    """
    for key, value in settings.items():
        if value:
            raise UserError(f"{key}: {value} is not supported with a list of prompts; leave it out")


def generate_list(
    kept: KeptEngine,
    model: GPT,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    settings: TextSettings,
    *,
    seed: int | None,
) -> list[WrittenText]:
    """The texts after several prompts, in their order; the random numbers of the second have seed + 1, and so on.

    Raises:
        UserError: as in `generate_text`, before anything is generated for prompts that do not fit.
    """
    for number, prompt in enumerate(prompts, 1):
        try:
            check_prompt(model, prompt.ids, settings.max_new_tokens, has_images=bool(prompt.media))
        except UserError as error:
            raise UserError(f"prompt {number} of {len(prompts)}: {error}") from None
    requests = [
        partial(settings.build_request, prompt, None if seed is None else seed + number)
        for number, prompt in enumerate(prompts)
    ]
    tokens = max((len(prompt.ids) for prompt in prompts), default=0) + settings.max_new_tokens - 1
    with kept.take(model, tokens=tokens) as engine:
        return list(generate_texts(engine, requests, tokenizer, settings.stops, continues=settings.continues))
