"""Log-probabilities of continuations are those of a plain forward pass, and common contexts are computed once."""

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from litgpt.errors import UserError
from litgpt.infer import likelihood as likelihood_module
from litgpt.infer.likelihood import Continuation, compute_likelihoods
from litgpt.infer.packed_step import Chunk
from litgpt.infer.perplexity import compute_perplexity, iter_windows
from litgpt.model.gpt import GPT
from tests.model.test_attention import small

TOWER = {"width": 8, "layers": 1, "heads": 2, "mlp_size": 8, "blocks_run": 1, "patch": 4, "image_token": 63}


@torch.inference_mode()
def score_plainly(model: GPT, item: Continuation) -> tuple[float, bool]:
    """The likelihood from the logits of the whole text."""
    ids = (item.context + item.tokens)[-(model.config.block_size + 1) :]
    prompts = torch.arange(len(ids) - 1)[None] < len(ids) - len(item.tokens)
    logits = model(torch.tensor([ids[:-1]]), prompts_BT=prompts)[0, -len(item.tokens) :]
    target = torch.tensor(item.tokens)
    logprobs = logits.log_softmax(-1).gather(1, target[:, None])
    return float(logprobs.double().sum()), bool((logits.argmax(-1) == target).all())


@pytest.mark.parametrize("vision", [None, {**TOWER, "prompt_blocks": True}], ids=["causal", "prompt blocks"])
def test_likelihoods_are_those_of_a_forward_pass(vision: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, rng = small(vision=vision), random.Random(1)
    shots = tuple(rng.choices(range(60), k=20))  # common to most contexts
    contexts = [shots + tuple(rng.choices(range(60), k=k)) for k in (1, 3, 3, 25)] + [(4,), (4, 5), shots]
    contexts.append(tuple(rng.choices(range(60), k=80)))  # too long
    ends = [(1,), (2,), (1, 2, 3), (1, 2, 4), (5, 6), tuple(range(30))]
    items = [Continuation(context, end) for context in contexts for end in ends]
    items.append(Continuation((4,), (5, 6)))  # the same text as (4, 5) with (6,)
    with torch.inference_mode():
        best = model(torch.tensor([[4, 5]]), prompts_BT=torch.ones(1, 2).bool())[0, -1].argmax().item()
    items.append(Continuation((4, 5), (int(best),)))
    expected = [score_plainly(model, item) for item in items]
    assert expected[-1][1]  # greedy
    for values, tokens, contexts_at_a_time in ((2**27, 8192, None), (64 * 7, 8192, None), (2**27, 40, 2)):
        monkeypatch.setattr(likelihood_module, "LOGIT_VALUES", values)
        monkeypatch.setattr(likelihood_module, "BATCH_TOKENS", tokens)
        answers = dict(compute_likelihoods(model, items, max_contexts=contexts_at_a_time))
        for number, (logprob, is_greedy) in enumerate(expected):
            assert answers[number].logprob == pytest.approx(logprob, abs=2e-5), items[number]
            assert answers[number].is_greedy == is_greedy


def test_common_contexts_are_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[int] = []
    run = likelihood_module.run_packed

    def count(model: Any, chunks: Sequence[Chunk], slabs: Any) -> Any:
        counts.append(sum(len(chunk.ids) for chunk in chunks))
        return run(model, chunks, slabs)

    monkeypatch.setattr(likelihood_module, "run_packed", count)
    shots = tuple(range(5, 35))
    items = [Continuation((*shots, 1, number), (choice,)) for number in range(3) for choice in range(4)]
    items += [Continuation((*shots, 1, 0), (7, 8, choice)) for choice in range(4)]
    list(compute_likelihoods(small(), items))
    assert counts == [31, 3, 2]  # the common prefix, the last token of the contexts, and (7, 8)


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (Continuation((), (1,)), "continuation: 1 tokens after 0"),
        (Continuation((1,), ()), "continuation: 0 tokens after 1"),
        (Continuation((1,), (2,) * 65), "65 tokens after 1; needs .* 1 to 64 tokens"),
        (Continuation((1,), (10**6,)), "continuation: has token 1000000"),
    ],
)
def test_texts_that_cannot_be_scored_are_one_line(item: Continuation, message: str) -> None:
    with pytest.raises(UserError, match=message):
        list(compute_likelihoods(small(), [item]))


def test_windows_score_each_token_once() -> None:
    ids = list(range(100, 123))
    windows = list(iter_windows(ids, 99, size=8, stride=3))
    assert [token for window in windows for token in window.tokens] == ids
    assert windows[0] == Continuation((99,), tuple(ids[:8]))
    for window in windows[1:]:
        assert len(window.context + window.tokens) == 9 and len(window.tokens) == 3
    assert list(iter_windows([], 99, size=8, stride=3)) == []
    assert list(iter_windows([1], 99, size=8, stride=8)) == [Continuation((99,), (1,))]


def test_perplexity_of_a_text() -> None:
    model, ids = small(), list(torch.randint(0, 60, (150,), generator=torch.Generator().manual_seed(0)).tolist())
    result = compute_perplexity(model, ids, 3, byte_count=300, window=32, stride=16)
    scores = [score_plainly(model, window)[0] for window in iter_windows(ids, 3, size=32, stride=16)]
    loss = -sum(scores) / 150
    assert result.token_perplexity == pytest.approx(torch.tensor(loss).exp().item(), rel=1e-5)
    assert result.bits_per_byte == pytest.approx(loss / torch.tensor(2.0).log().item() * 150 / 300, rel=1e-5)
    assert compute_perplexity(model, ids, 3, byte_count=300).stride == 32
    for window, stride, message in ((65, None, "window: 65 exceeds"), (8, 9, "stride: 9 exceeds window: 8")):
        with pytest.raises(UserError, match=message):
            compute_perplexity(model, ids, 3, byte_count=300, window=window, stride=stride)
