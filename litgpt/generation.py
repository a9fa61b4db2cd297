"""Load the model of a recipe, and write its texts to stdout or a file and their timings to stderr."""

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from litgpt.api import LLM
from litgpt.data.tokenizer import Tokenizer
from litgpt.errors import UserError
from litgpt.infer.engine import Engine
from litgpt.infer.kept_engine import KeptEngine
from litgpt.infer.prompt_files import PromptRow, WrittenText, generate_texts, read_prompts
from litgpt.infer.requests import GeneratedToken, Request, check_prompt
from litgpt.infer.text_settings import get_text_settings, prepare_texts
from litgpt.messages import print_message
from litgpt.recipe.generate import GenerationSettings, WrittenTexts

TEXTS_AT_A_TIME = 32  # for which there is memory, however long they are


def load_llm(
    checkpoint_dir: Path, settings: GenerationSettings, *, access_token: str | None = None, base: Path | None = None
) -> LLM:
    """Load the model of a command, and print how long it took.

    Args:
        checkpoint_dir, access_token, base: as in `LLM.load`.
    """
    start = time.perf_counter()
    llm = LLM.load(checkpoint_dir, access_token=access_token, distribute=None, base=base)
    llm.distribute(precision=settings.precision, quantize=settings.quantize)
    llm.split_sounds, llm.video_sounds = settings.split_sounds, settings.video_sounds
    llm.kept_engine = KeptEngine(build=partial(Engine, compile=settings.compile))
    print_message(f"Time to load the model: {time.perf_counter() - start:.2f} seconds.")
    return llm


def write_texts(recipe: WrittenTexts, load: Callable[[], LLM]) -> LLM:
    """Generate and write the texts of a recipe.

    Args:
        load: loads the model, after the prompts are read.

    Returns:
        the model.
    """
    rows = None if recipe.prompts is None else read_prompts(recipe.prompts)
    llm = load()
    if rows is not None:
        generate_file(llm, recipe, rows)
    else:
        torch.manual_seed(recipe.seed)
        for number in range(1, recipe.num_samples + 1):
            generate_sample(llm, recipe, number)
    if next(llm.model.parameters()).device.type == "cuda":
        print_message(f"Memory used: {torch.cuda.max_memory_allocated() / 1e9:.2f} GB")
    return llm


def generate_sample(llm: LLM, recipe: WrittenTexts, number: int) -> None:
    """Generate and print one text, piece by piece if it is streamed, and its time."""
    start = time.perf_counter()
    tokens: list[int] = []
    pieces = llm.generate(
        recipe.prompt,
        recipe.sys_prompt,
        **get_text_settings(recipe),
        stream=True,
        chat_template=recipe.chat_template,
        images=recipe.media.get("image"),
        videos=recipe.media.get("video"),
        audios=recipe.media.get("audio"),
        on_token=tokens.append,
    )
    text = chain([] if llm.replies(recipe.chat_template) else [recipe.prompt], pieces)
    for piece in text if recipe.stream else ["".join(text)]:
        print(piece, end="", flush=True)
    print(flush=True)
    seconds = time.perf_counter() - start
    print_message(f"Time for inference {number}: {seconds:.2f} sec total, {len(tokens) / seconds:.2f} tokens/sec")


def generate_file(llm: LLM, recipe: WrittenTexts, rows: Sequence[PromptRow]) -> None:
    """Generate the texts of a file of prompts, many at a time, and write a line of JSON for each in their order."""
    start, tokens = time.perf_counter(), 0
    labels = [
        {"index": index, "sample": sample, **row.values}
        for index, row in enumerate(rows)
        for sample in range(recipe.num_samples)
    ]
    with LinesFile(recipe.output) as write:
        texts = iter_row_texts(llm, recipe, rows, logprobs=recipe.logprobs, num_samples=recipe.num_samples)
        for label, text in zip(labels, texts, strict=True):
            tokens += len(text.tokens)
            line = {**label, "text": text.text, "finish_reason": text.finish_reason}
            if recipe.logprobs is not None:
                line["logprobs"] = describe_logprobs(text.tokens, llm.tokenizer)
            write(json.dumps(line, ensure_ascii=False))
    seconds = time.perf_counter() - start
    print_message(f"Time for {len(labels)} texts: {seconds:.2f} sec total, {tokens / seconds:.2f} tokens/sec")


def iter_row_texts(
    llm: LLM,
    recipe: GenerationSettings,
    rows: Sequence[PromptRow],
    *,
    logprobs: int | None = None,
    num_samples: int = 1,
) -> Iterator[WrittenText]:
    """Generate the texts of prompts, many at a time, and yield them in their order.

    Raises:
        UserError: naming the location of a prompt that does not fit, or whose media cannot be read.
    """
    encoder = llm.prompt_encoder()
    prompts = [row.encode(encoder, recipe.sys_prompt, recipe.chat_template) for row in rows]
    is_chat = any(row.key == "messages" for row in rows)  # which the chat template renders, not the prompt style
    settings = prepare_texts(
        encoder,
        rows=llm.config.padded_vocab_size or 0,
        chat_template=True if is_chat else recipe.chat_template,
        logprobs=logprobs,
        **get_text_settings(recipe),
    )
    requests: list[Callable[[], Request]] = []
    for row, prompt in zip(rows, prompts, strict=True):
        try:
            check_prompt(llm.model, prompt.ids, recipe.max_new_tokens, has_images=bool(prompt.media))
        except UserError as error:
            raise UserError(f"{row.location}: {error}") from None
        for _ in range(num_samples):
            requests.append(partial(settings.build_request, prompt, recipe.seed + len(requests)))
    room = TEXTS_AT_A_TIME * llm.config.block_size
    with llm.kept_engine.take(llm.model, tokens=room) as engine:
        yield from generate_texts(engine, requests, llm.tokenizer, settings.stops, continues=settings.continues)


def describe_logprobs(tokens: Iterable[GeneratedToken], tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """For each token its text, log-probability and the most likely ones."""
    return [
        {
            **{"token": token.token, "text": tokenizer.decode([token.token]), "logprob": token.logprob},
            "top": [
                {"token": other, "text": tokenizer.decode([other]), "logprob": logprob} for other, logprob in token.top
            ],
        }
        for token in tokens
    ]


class LinesFile:
    """Writes lines to a file that gets its name when it is complete, or to stdout if the path is None."""

    def __init__(self, path: Path | None) -> None:
        self.path = path

    def __enter__(self) -> Any:
        if self.path is None:
            return partial(print, flush=True)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.partial = self.path.with_name(f"{self.path.name}.partial")
        self.file = self.partial.open("w", encoding="utf-8")
        return partial(print, file=self.file, flush=True)

    def __exit__(self, kind: Any, *_: object) -> None:
        if self.path is not None:
            self.file.close()
            if kind is None:
                os.replace(self.partial, self.path)
