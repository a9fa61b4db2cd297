"""The engine against transformers, token for token: alone, batched, in chunks, with shared prefixes, preempted."""

import copy
from pathlib import Path

import pytest
import torch

from litgpt.infer.engine import Engine, Sequence
from litgpt.infer.load import open_model
from litgpt.infer.requests import Request
from litgpt.infer.sampling import Sampling
from litgpt.model.gpt import GPT
from tests.parity import test_expert_families as experts
from tests.parity import test_families as families

DENSE = ("llama", "mistral", "qwen3", "gemma2", "gemma3", "gpt_neox", "gpt2", "cohere2", "falcon", "phi3", "olmo3")
SPARSE = ("mixtral-window", "qwen3-moe", "deepseek-v2", "deepseek-v3", "gpt-oss", "llama4")
ALWAYS = ("llama", "gemma2", "gpt2", "mixtral-window", "deepseek-v3", "gpt-oss")
"""One of each kind; the others are slow tests."""
NEW_TOKENS, PREFIX = 16, 21
LENGTHS = (22, 4, 37, 30, 22, 46)


def build_prompts() -> list[tuple[int, ...]]:
    """Random prompts, most of which begin with the same tokens."""
    generator = torch.Generator().manual_seed(2)
    first, *others = torch.randint(3, 96, (len(LENGTHS) + 1, max(LENGTHS)), generator=generator).tolist()
    return [tuple([*first[:PREFIX], *other][:length]) for other, length in zip(others, LENGTHS, strict=True)]


def open_reference(name: str, folder: Path) -> tuple[GPT, list[list[int]]]:
    """A small model, and the greedy texts of transformers after each prompt."""
    reference = families.build_reference(families.ROWS[name]) if name in DENSE else experts.build_reference(name)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for matrix in (parameter for parameter in reference.parameters() if parameter.dim() > 1):
            matrix.add_(torch.randn(matrix.shape, generator=generator) * 0.3)  # so that texts do not repeat themselves
    reference.save_pretrained(folder)
    reference.generation_config.eos_token_id = None
    texts = [
        reference.generate(torch.tensor([prompt]), max_new_tokens=NEW_TOKENS, do_sample=False)[0, len(prompt) :]
        for prompt in build_prompts()
    ]
    return open_model(folder, device=torch.device("cpu")), [text.tolist() for text in texts]


def list_ids(sequences: list[Sequence]) -> list[list[int]]:
    return [[token.token for token in sequence.tokens] for sequence in sequences]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in ALWAYS else pytest.mark.slow) for name in (*DENSE, *SPARSE)]
)
def test_texts_equal_those_of_transformers(name: str, tmp_path: Path) -> None:
    model, expected = open_reference(name, tmp_path)
    assert len({token for text in expected for token in text}) > 5
    plain = [Request(prompt, NEW_TOKENS, Sampling(0)) for prompt in build_prompts()]
    assert [list_ids(Engine(model).run([request]))[0] for request in plain] == expected
    batched = Engine(model)
    assert list_ids(batched.run(plain)) == expected
    assert list_ids(batched.run(plain[::-1])) == expected[::-1]  # every prompt is in the cache
    assert list_ids(Engine(model, prefill_chunk=5).run(plain)) == expected
    small = Engine(model, cache_tokens=200, prefill_chunk=16)
    assert list_ids(small.run(plain)) == expected and small.cache.allocated_tokens <= 200
    speculative = Engine(model, draft=build_draft(model), prefill_chunk=16)
    assert list_ids(speculative.run(plain)) == expected
    assert speculative.draft is not None and 0 < speculative.draft.accepted < speculative.draft.proposed
    requests = [Request(prompt, NEW_TOKENS, Sampling(0), logprobs=3, prompt_logprobs=0) for prompt in build_prompts()]
    for sequence in Engine(model.double(), prefill_chunk=16).run(requests):
        check_logprobs(model, sequence)


@torch.no_grad()
def build_draft(model: GPT) -> GPT:
    """A model that often agrees: the same with some noise."""
    draft, generator = copy.deepcopy(model), torch.Generator().manual_seed(5)
    for parameter in draft.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator) * parameter.std() * 0.1)
    return draft


@torch.no_grad()
def check_logprobs(model: GPT, sequence: Sequence) -> None:
    """Log-probabilities are those of a forward pass of training over prompt and text."""
    ids = [*sequence.request.prompt, *(token.token for token in sequence.tokens)]
    logprobs = model(torch.tensor([ids[:-1]])).log_softmax(-1)[0]
    measured = [*sequence.prompt_logprobs, *sequence.tokens]
    expected = logprobs.gather(-1, torch.tensor(ids[1:])[:, None])[:, 0]
    values = torch.tensor([token.logprob for token in measured], dtype=torch.float64)
    torch.testing.assert_close(values, expected, atol=1e-6, rtol=1e-6)
    best = logprobs.topk(3)
    for token, top in zip(sequence.tokens, best.indices[-NEW_TOKENS:].tolist(), strict=True):
        assert [number for number, _ in token.top] == top
