"""Rows of conversations, and the data module and batches of them, for tests."""

import itertools
import json
import random
from pathlib import Path
from typing import Any

import torch

from litgpt.data import Conversations
from litgpt.data.stream.batch import Batch
from litgpt.data.tokenizer import Tokenizer

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "and", "forty", "two", "more"]


def rows(count: int, seed: int = 0, **rest: Any) -> list[dict[str, Any]]:
    """Questions with their own number in them, and answers of many lengths."""
    order = random.Random(seed)
    return [
        {"query": f"number {seed}-{number}", "response": " ".join(order.choices(WORDS, k=order.randint(1, 30)))} | rest
        for number in range(count)
    ]


def write(path: Path, lines: list[Any]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def module(tmp_path: Path, tokenizer: Tokenizer, sources: list[Any] | None = None, **settings: Any) -> Conversations:
    if sources is None:
        sources = [str(write(tmp_path / "rows.jsonl", rows(60)))]
    data = Conversations(sources=sources, cache_dir=tmp_path / "cache", num_workers=0, **settings)
    data.connect(tokenizer)
    data.prepare_data()
    data.setup()
    return data


def samples_of(batch: Batch) -> list[tuple[list[int], list[int]]]:
    """The ids and labels of each sample in a batch, without padding."""
    samples = []
    for row in range(batch.ids.shape[0]):
        numbers = torch.zeros_like(batch.ids[row]) if batch.documents is None else batch.documents[row]
        for number in range(int(numbers.max()) + 1):
            samples.append((batch.ids[row][numbers == number].tolist(), batch.labels[row][numbers == number].tolist()))
    return samples


def questions(batches: list[Batch], tokenizer: Tokenizer) -> list[str]:
    texts = [tokenizer.decode(ids) for batch in batches for ids, _ in samples_of(batch)]
    return [text.split("number ")[1].split("\n")[0] for text in texts]


def equal(one: Batch, other: Batch) -> bool:
    names = ("ids", "labels", "documents", "positions", "weights", "channels")
    pairs = [(getattr(one, name), getattr(other, name)) for name in names]
    return all((a is None and b is None) or (a is not None and b is not None and torch.equal(a, b)) for a, b in pairs)


def take(stream: Any, count: int) -> list[Batch]:
    return list(itertools.islice(stream, count))
