"""Score a model on a file of prompts with answers: the share of texts that are an answer."""

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from litgpt.data.read.fields import BadRow
from litgpt.data.read.row_sources import read_rows
from litgpt.errors import UserError
from litgpt.infer.prompt_files import PromptRow, WrittenText, parse_prompt_row

METRIC = "exact_match"


class ScoredPrompt(NamedTuple):
    """A prompt, and the texts that are right."""

    row: PromptRow
    answers: tuple[str, ...]


def read_scored_prompts(path: Path) -> list[ScoredPrompt]:
    """The rows of a .jsonl file: those of `read_prompts`, with an `answer`, a text or a list of texts.

    Raises:
        UserError: naming the line of the first row without a prompt or an answer.
    """
    if path.suffix != ".jsonl":
        raise UserError(f"prompts: {path} is not a .jsonl; use a file of rows with prompt or messages, and answer")
    prompts = []
    for location, row in read_rows(path):
        prompt = parse_prompt_row(location, row, path.parent)
        assert not isinstance(row, BadRow)  # which has been refused
        value = row.get("answer")
        answers = tuple(value) if isinstance(value, list) else (value,)
        if not answers or not all(isinstance(answer, str) for answer in answers):
            raise UserError(f'{location}: answer: not a text or a list of texts; write {{"answer": "text"}}')
        prompts.append(ScoredPrompt(prompt, answers))
    if not prompts:
        raise UserError(f"prompts: {path} has no prompts; use a file with at least one")
    return prompts


def score_prompts(
    path: Path,
    prompts: Sequence[ScoredPrompt],
    generate: Callable[[Sequence[PromptRow]], Iterable[WrittenText]],
) -> dict[str, Any]:
    """The score of a model, and the samples in the form of lm-eval.

    Args:
        path: of the prompts.
        generate: generates the texts of prompts in their order.

    Returns:
        `prompts`, with the share of texts that equal an answer but for white space, and `samples`.
    """
    samples = list[dict[str, Any]]()
    right = 0
    for prompt, text in zip(prompts, generate([prompt.row for prompt in prompts]), strict=True):
        is_right = any(text.text.split() == answer.split() for answer in prompt.answers)
        right += is_right
        samples.append(
            {
                "arguments": [[describe_prompt(prompt.row)]],
                "target": " | ".join(prompt.answers),
                "filtered_resps": [text.text],
                "metrics": [METRIC],
                METRIC: float(is_right),
            }
        )
    count, share = len(samples), right / len(samples)
    error = math.sqrt(share * (1 - share) / (count - 1)) if count > 1 else None
    scores = {"file": str(path), "count": count, METRIC: share, f"{METRIC}_stderr": error}
    return {"prompts": scores, "samples": {path.name: samples}}


def describe_prompt(row: PromptRow) -> str:
    """The prompt of a row as one text, with the media that are paths."""
    sources = [source for kind in row.sources.values() for source in kind]
    paths = [source for source in sources if isinstance(source, str) and not source.startswith("data:")]
    text = row.value if isinstance(row.value, str) else "\n".join(map(describe_message, row.value))
    return " ".join([*(f"[{path}]" for path in paths), text])


def describe_message(message: dict[str, Any]) -> str:
    """The role of a message and the texts in its content."""
    content = message.get("content")
    parts = content if isinstance(content, list) else [content]
    texts = (part.get("text", f"[{part.get('type')}]") if isinstance(part, dict) else part for part in parts)
    return f"{message['role']}: {''.join(map(str, texts))}"
