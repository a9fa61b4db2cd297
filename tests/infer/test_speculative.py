"""Speculative decoding: texts have the distribution of the large model, and a draft that never fits changes nothing."""

import pytest
import torch

from litgpt.errors import UserError
from litgpt.infer.engine import Engine
from litgpt.infer.requests import Request
from litgpt.infer.sampling import SampledRow, Sampling, compute_probabilities, draw_tokens, sample_rows
from litgpt.infer.speculative import Draft, Proposal
from tests.model.test_attention import small

PROMPT = tuple(range(5, 30))
DRAWS = 6000


def test_first_and_second_tokens_have_the_distribution_of_the_large_model() -> None:
    generator = torch.Generator().manual_seed(1)
    p_logits, q_logits = torch.randn(2, 5, generator=generator) * 2, torch.randn(1, 5, generator=generator) * 2
    row = SampledRow(Sampling(temperature=1.3, top_k=4), [0], [], generator)
    draft = Draft(small(), proposed_tokens=1, max_tokens=64)
    q_RV = compute_probabilities(q_logits, [row])
    counts = torch.zeros(2, 5)
    for _ in range(DRAWS):
        proposal = Proposal(draw_tokens(q_RV.log(), [generator]).tolist(), q_RV)
        for place, token in enumerate(draft.check(proposal, p_logits, row)):
            counts[place, token] += 1
    expected = compute_probabilities(p_logits, [row, row])
    assert expected.gt(0).sum(-1).tolist() == [4, 4] and 0.1 < draft.accepted / DRAWS < 0.95
    for measured, probabilities in zip(counts, expected, strict=True):
        deviations = (measured / measured.sum() - probabilities).abs()
        assert bool((deviations <= 4.5 * (probabilities * (1 - probabilities) / measured.sum()).sqrt()).all())


def test_penalties_count_the_proposed_tokens() -> None:
    row = SampledRow(Sampling(temperature=0, frequency_penalty=1.0), [0], [])
    logits = torch.tensor([[0.0, 0.5, 0.0], [0.0, 0.5, 0.0]])
    draft = Draft(small(), proposed_tokens=1, max_tokens=64)
    assert draft.check(Proposal([1], torch.eye(3)[[1]]), logits, row) == [1, 0]
    assert sample_rows(logits[:1], [row]).tolist() == [1]


def test_a_seed_gives_the_same_text_whatever_else_is_generated() -> None:
    model, sampling = small(), Sampling(temperature=1.2)
    requests = [Request(PROMPT[number:], 20, sampling, seed=number, logprobs=1) for number in range(3)]
    engine = Engine(model, draft=model, speculative_k=4)
    together = engine.run(requests)
    assert engine.draft is not None and engine.draft.accepted == engine.draft.proposed > 20  # its own draft
    for request, sequence in zip(requests, together, strict=True):
        [alone] = Engine(model, draft=model, speculative_k=4).run([request])
        assert [token.token for token in alone.tokens] == [token.token for token in sequence.tokens]
        assert all(token.logprob is not None and len(token.top) == 1 for token in sequence.tokens)
    assert not engine.draft.cache.blocks  # its memory is free


def test_stop_tokens_and_lengths_end_a_text_within_a_proposal() -> None:
    model = small()
    expected = [token.token for token in Engine(model).run([Request(PROMPT, 9, Sampling(0))])[0].tokens]
    [whole] = Engine(model, draft=model, speculative_k=7).run([Request(PROMPT, 9, Sampling(0))])
    assert [token.token for token in whole.tokens] == expected and whole.finish_reason == "length"
    stops = frozenset([expected[5]])
    [stopped] = Engine(model, draft=model, speculative_k=7).run([Request(PROMPT, 9, Sampling(0), stops)])
    assert [token.token for token in stopped.tokens] == expected[: expected.index(expected[5]) + 1]


def test_a_draft_without_memory_proposes_nothing() -> None:
    draft = Draft(small(), proposed_tokens=3, max_tokens=27)
    row = SampledRow(Sampling(0), PROMPT, [])
    assert draft.propose({1: ([*PROMPT], row, 20)}) == {}


@pytest.mark.parametrize("broken", ["draft", "target"])
def test_logits_that_are_not_finite_are_one_line(broken: str) -> None:
    models = {"draft": small(), "target": small()}
    with torch.no_grad():
        models[broken].norm.weight.fill_(torch.nan)
    with pytest.raises(UserError, match="logits are not finite"):
        Engine(models["target"], draft=models["draft"]).run([Request(PROMPT, 9, Sampling(0))])


def test_drafts_that_cannot_work_are_one_line() -> None:
    with pytest.raises(UserError, match=r"draft_model_checkpoint_dir: .*has 96 tokens, but .*has 64"):
        Engine(small(), draft=small(padded_vocab_size=96))
    with pytest.raises(UserError, match="speculative_k: 0 is less than 1"):
        Engine(small(), draft=small(), speculative_k=0)
