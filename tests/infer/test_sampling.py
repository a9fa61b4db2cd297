"""Sampling: probabilities against transformers and brute force; rows are independent; frequencies; wrong settings."""

import math
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from litgpt.errors import UserError
from litgpt.infer import sampling as sampling_module
from litgpt.infer.sampling import (
    SampledRow,
    Sampling,
    adjust_logits,
    filter_logits,
    keep_nucleus,
    sample_rows,
    sort_nucleus,
)

SCORES = st.lists(st.one_of(st.integers(-4, 4).map(float), st.floats(-30, 30, width=32)), min_size=1, max_size=12)
SETTINGS = st.builds(
    Sampling, st.floats(0.05, 5), st.one_of(st.none(), st.integers(2, 15)), st.one_of(st.just(1.0), st.floats(0.01, 1))
)


def kept(scores: Tensor) -> list[bool]:
    return (scores > -math.inf).squeeze(0).tolist()


@settings(max_examples=400, deadline=None)
@given(SCORES, SETTINGS)
def test_kept_tokens_equal_those_of_transformers(values: list[float], sampling: Sampling) -> None:
    scores = torch.tensor([values])
    expected = scores - scores.max()  # they round otherwise where scores are large
    steps = [TemperatureLogitsWarper(float(sampling.temperature))]
    steps += [TopKLogitsWarper(sampling.top_k)] if sampling.top_k else []
    steps += [TopPLogitsWarper(sampling.top_p)] if sampling.top_p < 1 else []
    for step in steps:
        expected = step(torch.zeros(1, 1, dtype=torch.long), expected)
    filtered = filter_logits(scores, [sampling])
    assert kept(filtered) == kept(expected)
    torch.testing.assert_close(filtered, expected)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(-40, 40), min_size=2, max_size=9, unique=True), SETTINGS)
def test_kept_tokens_by_brute_force(values: list[int], sampling: Sampling) -> None:
    """Distinct logits: keep the most likely tokens while their number and total probability are too small."""
    order = sorted(range(len(values)), key=lambda token: -values[token])[: sampling.top_k]
    shares = [math.exp((values[token] - max(values)) / sampling.temperature) for token in order]
    expected, before = set(), 0.0
    for token, share in zip(order, shares, strict=True):
        if before and abs(before / sum(shares) - sampling.top_p) < 1e-5:
            return  # too close to say
        if sampling.top_p < 1 and before / sum(shares) >= sampling.top_p:
            break
        expected.add(token)
        before += share
    filtered = kept(filter_logits(torch.tensor([values], dtype=torch.float32), [sampling]))
    if sampling.top_p == 1:
        expected = set(order)
    assert {token for token, stays in enumerate(filtered) if stays} == expected


VOCABULARY = 24
PROMPT, TEXT = [3, 5, 5, 9], [5, 11, 11, 11, 2]
BIAS = {5: 1.5, 7: -2.0, 11: 0.25}
ORDERED: list[Sampling] = [
    Sampling(logit_bias=BIAS),
    Sampling(repetition_penalty=1.4),
    Sampling(repetition_penalty=0.7, logit_bias=BIAS),
    Sampling(min_p=0.2),
    Sampling(0.7, min_p=0.1, top_p=0.8),
    Sampling(2.5, top_k=9, top_p=0.9, min_p=0.3),
    Sampling(1.3, top_k=12, top_p=0.95, min_p=0.05, repetition_penalty=1.2, logit_bias=BIAS),
]


def build_processors(sampling: Sampling) -> LogitsProcessorList:
    """The processors of transformers in the order in which its `generate` applies them."""
    bias = [[[token], value] for token, value in sampling.logit_bias.items()]
    return LogitsProcessorList(
        [
            *([SequenceBiasLogitsProcessor(bias)] if bias else []),
            RepetitionPenaltyLogitsProcessor(float(sampling.repetition_penalty)),
            TemperatureLogitsWarper(float(sampling.temperature)),
            *([TopKLogitsWarper(sampling.top_k)] if sampling.top_k else []),
            *([TopPLogitsWarper(sampling.top_p)] if sampling.top_p < 1 else []),
            *([MinPLogitsWarper(sampling.min_p)] if sampling.min_p else []),
        ]
    )


def test_probabilities_equal_those_of_transformers_in_a_batch_of_different_settings() -> None:
    scores = torch.randn(len(ORDERED), VOCABULARY, generator=torch.Generator().manual_seed(0)) * 3
    ids = torch.tensor([PROMPT + TEXT])
    expected = torch.cat(
        [build_processors(sampling)(ids, row[None].clone()) for sampling, row in zip(ORDERED, scores, strict=True)]
    )
    rows = [SampledRow(sampling, PROMPT, TEXT) for sampling in ORDERED]
    filtered = filter_logits(adjust_logits(scores, rows), ORDERED)
    torch.testing.assert_close(filtered.softmax(-1), expected.softmax(-1))


def test_a_small_nucleus_is_found_without_sorting_all_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last rows have more tokens in it than are looked at first."""
    numbers = torch.Generator().manual_seed(6)
    scores = torch.randn(40, 500, generator=numbers) * torch.linspace(6, 0.1, 40)[:, None]
    shares = torch.rand(40, 1, generator=numbers, dtype=torch.float64) * 0.98 + 0.01
    expected = sort_nucleus(scores, shares)
    monkeypatch.setattr(sampling_module, "NUCLEUS_TOKENS", 50)
    counted = (expected > -math.inf).sum(-1)
    assert counted.min() == 1 and counted.median() < 50 < counted.max()
    assert torch.equal(keep_nucleus(scores, shares), expected)


def test_presence_and_frequency_penalties_count_the_text_and_not_the_prompt() -> None:
    scores = torch.randn(1, VOCABULARY, generator=torch.Generator().manual_seed(1))
    row = SampledRow(Sampling(presence_penalty=0.75, frequency_penalty=-0.5), PROMPT, TEXT)
    costs = {token: 0.75 - 0.5 * count for token, count in Counter(TEXT).items()}
    expected = [score - costs.get(token, 0.0) for token, score in enumerate(scores[0].tolist())]
    torch.testing.assert_close(adjust_logits(scores, [row])[0], torch.tensor(expected))
    assert torch.equal(adjust_logits(scores, [SampledRow(row.sampling, PROMPT, [])]), scores)


def test_a_seeded_token_does_not_depend_on_other_texts() -> None:
    scores = torch.randn(200, VOCABULARY, generator=torch.Generator().manual_seed(2))
    choices = [*ORDERED, Sampling(), Sampling(0), Sampling(1.5, presence_penalty=2.0)]

    def build(index: int) -> SampledRow:
        return SampledRow(choices[index % len(choices)], PROMPT, TEXT, torch.Generator().manual_seed(index))

    together = sample_rows(scores, [build(index) for index in range(200)])
    alone = [int(sample_rows(scores[index : index + 1], [build(index)])) for index in range(200)]
    assert together.tolist() == alone
    assert len(set(alone)) > 10


@pytest.mark.parametrize("seeded", [False, True])
def test_tokens_are_sampled_with_their_probabilities(seeded: bool) -> None:
    scores = torch.tensor([[1.0, 0.0, 2.0, -1.0, 3.0]]).expand(5000, 5)
    numbers = torch.Generator().manual_seed(3) if seeded else None
    torch.manual_seed(4)
    drawn = sample_rows(scores, [SampledRow(Sampling(2.0, top_k=4), [0], [], numbers)] * 5000)
    shares = torch.tensor([0.5, 0.0, 1.0, -math.inf, 1.5]).softmax(0)
    torch.testing.assert_close(drawn.bincount(minlength=5) / 5000, shares, atol=0.03, rtol=0)


def test_tokens_that_are_not_kept_are_never_sampled() -> None:
    """Half of the tokens have probability 0, also at both ends of the vocabulary."""
    scores = torch.zeros(500, 6)
    scores[:, ::2] = -1e4
    scores[:, -1] = -1e4
    assert set(sample_rows(scores, [SampledRow(Sampling(), [0], [])] * 500).tolist()) == {1, 3}


class OnlyTokens:
    """A constraint that always allows the same tokens."""

    def __init__(self, tokens: list[int]) -> None:
        self.mask = torch.zeros(VOCABULARY, dtype=torch.bool)
        self.mask[tokens] = True

    def allowed(self) -> Tensor:
        return self.mask

    def accept(self, token: int) -> None:
        raise AssertionError(token)  # the engine's task


@pytest.mark.parametrize("sampling", [Sampling(0), Sampling(5.0), Sampling(top_p=0.01), Sampling(logit_bias={0: 99})])
def test_only_tokens_that_a_constraint_allows_are_sampled(sampling: Sampling) -> None:
    scores = torch.randn(60, VOCABULARY, generator=torch.Generator().manual_seed(5))
    rows = [SampledRow(sampling, PROMPT, [], None, OnlyTokens([4, 17]) if index % 2 else None) for index in range(60)]
    tokens = sample_rows(scores, rows)
    assert set(tokens[1::2].tolist()) == {4, 17}
    assert not set(tokens[::2].tolist()) <= {4, 17}


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_logits_that_are_not_finite_are_refused(value: float) -> None:
    scores = torch.zeros(3, VOCABULARY)
    scores[1, 2] = value
    with pytest.raises(UserError, match=r"logits are not finite; set precision: 32-true"):
        sample_rows(scores, [SampledRow(Sampling(0), PROMPT, [])] * 3)


@pytest.mark.parametrize("sampling", [Sampling(0), Sampling(top_p=0.0), Sampling(top_k=1), Sampling(1e-30)])
def test_greedy_sampling_selects_the_most_likely_token(sampling: Sampling) -> None:
    scores = torch.randn(50, 30, generator=torch.Generator().manual_seed(0)) * 1e4
    for logits in (scores, (scores / 1e4).bfloat16()):  # with ties: the first of the tokens
        assert torch.equal(sample_rows(logits, [SampledRow(sampling, [0], [])] * 50), logits.argmax(-1))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": -0.1}, "temperature: -0.1"),
        ({"temperature": math.nan}, "temperature: nan"),
        ({"temperature": math.inf}, "temperature: inf"),
        ({"top_k": 0}, "top_k: 0"),
        ({"top_p": 1.5}, "top_p: 1.5"),
        ({"top_p": math.nan}, "top_p: nan"),
        ({"min_p": -0.1}, "min_p: -0.1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty: 0.0"),
        ({"repetition_penalty": math.inf}, "repetition_penalty: inf"),
        ({"presence_penalty": 2.5}, "presence_penalty: 2.5"),
        ({"frequency_penalty": math.nan}, "frequency_penalty: nan"),
        ({"logit_bias": {3: math.nan}}, "logit_bias: nan for token 3"),
    ],
)
def test_wrong_settings_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Sampling(**values)
