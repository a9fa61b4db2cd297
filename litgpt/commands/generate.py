"""`litgpt generate`: print generated text to stdout and timings to stderr."""

import time
from itertools import chain

import torch

from litgpt.api import LLM
from litgpt.messages import print_message
from litgpt.recipe.generate import Generate


def run(recipe: Generate) -> None:
    """Load the model and generate the samples."""
    start = time.perf_counter()
    llm = LLM.load(recipe.checkpoint_dir, distribute=None)
    llm.distribute(precision=recipe.precision, quantize=recipe.quantize)
    if recipe.compile:
        llm.model.compile(dynamic=True)
    print_message(f"Time to load the model: {time.perf_counter() - start:.2f} seconds.")
    torch.manual_seed(recipe.seed)
    for number in range(1, recipe.num_samples + 1):
        generate_sample(llm, recipe, number)
    if llm.model.embedding.weight.device.type == "cuda":
        print_message(f"Memory used: {torch.cuda.max_memory_allocated() / 1e9:.2f} GB")


def generate_sample(llm: LLM, recipe: Generate, number: int) -> None:
    """Generate and print one text, piece by piece if it is streamed, and its time."""
    start = time.perf_counter()
    tokens: list[int] = []
    pieces = llm.generate(
        recipe.prompt,
        recipe.sys_prompt,
        max_new_tokens=recipe.max_new_tokens,
        temperature=recipe.temperature,
        top_k=recipe.top_k,
        top_p=recipe.top_p,
        stream=True,
        stop=recipe.stop,
        chat_template=recipe.chat_template,
        on_token=tokens.append,
    )
    text = chain([] if llm.replies(recipe.chat_template) else [recipe.prompt], pieces)
    for piece in text if recipe.stream else ["".join(text)]:
        print(piece, end="", flush=True)
    print(flush=True)
    seconds = time.perf_counter() - start
    print_message(f"Time for inference {number}: {seconds:.2f} sec total, {len(tokens) / seconds:.2f} tokens/sec")
