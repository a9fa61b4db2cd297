"""Sampling: the tokens that are kept, against brute force and against transformers; frequencies; wrong settings."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from litgpt.errors import UserError
from litgpt.infer.sampling import Sampling, filter_logits, sample_token

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
    filtered = filter_logits(scores, sampling)
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
    filtered = kept(filter_logits(torch.tensor([values], dtype=torch.float32), sampling))
    if sampling.top_p == 1:
        expected = set(order)
    assert {token for token, stays in enumerate(filtered) if stays} == expected


def test_tokens_are_sampled_with_their_probabilities() -> None:
    scores = torch.tensor([[1.0, 0.0, 2.0, -1.0, 3.0]])
    sampling = Sampling(temperature=2.0, top_k=4)
    numbers = torch.Generator().manual_seed(3)
    drawn = sample_token(scores.expand(20_000, 5), sampling, numbers).flatten().bincount(minlength=5) / 20_000
    shares = torch.tensor([0.5, 0.0, 1.0, -math.inf, 1.5]).softmax(0)
    torch.testing.assert_close(drawn, shares, atol=0.015, rtol=0)


@pytest.mark.parametrize("sampling", [Sampling(0), Sampling(top_p=0.0), Sampling(top_k=1), Sampling(1e-30)])
def test_greedy_sampling_selects_the_most_likely_token(sampling: Sampling) -> None:
    scores = torch.randn(50, 30, generator=torch.Generator().manual_seed(0)) * 1e4
    assert torch.equal(sample_token(scores, sampling).flatten(), scores.argmax(-1))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": -0.1}, "temperature: -0.1"),
        ({"temperature": math.nan}, "temperature: nan"),
        ({"temperature": math.inf}, "temperature: inf"),
        ({"top_k": 0}, "top_k: 0"),
        ({"top_p": 1.5}, "top_p: 1.5"),
        ({"top_p": math.nan}, "top_p: nan"),
    ],
)
def test_wrong_settings_are_refused(values: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Sampling(**values)  # type: ignore[arg-type]
