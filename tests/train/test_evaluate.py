"""Samples during training: with a key-value cache, they are those of the model without one."""

from typing import Any

import pytest
import torch

from litgpt import adapt
from litgpt.parallel.precision import PRECISIONS
from litgpt.recipe.tuner import Adapter
from litgpt.train import evaluate
from litgpt.train.train_state import TrainState
from tests.infer.test_generate import KINDS_HERE, PROMPT
from tests.model.test_attention import small


def sample(kind: str, precision: str = "32-true", **settings: Any) -> tuple[list[int], list[int]]:
    """A sample, and the number of tokens that each forward pass computes."""
    model, lengths = small(**KINDS_HERE[kind]).train(), list[int]()
    adapt.attach(model, Adapter(start_layer=0))
    adapt.initialize_adapter(model, Adapter(start_layer=0), 0)
    model.register_forward_pre_hook(lambda _model, ids: lengths.append(ids[0].shape[1]))
    train_state = TrainState(model, [], torch.device("cpu"), PRECISIONS[precision])
    arguments: dict[str, Any] = {"max_new_tokens": 14, "window": 32, "seed": 1} | settings
    tokens = evaluate.sample_continuation(train_state, PROMPT, **arguments)
    assert model.training
    return tokens, lengths


@pytest.mark.parametrize("kind", sorted(KINDS_HERE.keys() - {"latent"}))
def test_samples_are_the_same_with_and_without_a_cache(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    results = {}
    for name, settings in {"greedy": {"top_k": 1}, "sampled": {"temperature": 5.0}, "window": {"window": 11}}.items():
        results[name], lengths = sample(kind, **settings)
        past_window = name == "window"
        assert lengths == [7, *[1] * (4 if past_window else 13), *[11] * (9 if past_window else 0)]
    monkeypatch.setattr(evaluate, "build_cache", lambda _train_state: None)
    assert results["greedy"] == sample(kind, top_k=1)[0]
    assert results["sampled"] == sample(kind, temperature=5.0)[0]
    assert results["window"] == sample(kind, window=11)[0]
    assert sample(kind)[1] == list(range(7, 21))


def test_compiled_blocks_run_eagerly() -> None:
    model = small()
    calls = [block._compiled_call_impl for block in model.local_blocks]
    for block in model.local_blocks:
        block._compiled_call_impl = lambda *_args: pytest.fail("compiled for each length")
    train_state = TrainState(model, [], torch.device("cpu"), PRECISIONS["bf16-mixed"])
    assert len(evaluate.sample_continuation(train_state, PROMPT, max_new_tokens=3, window=9, seed=0)) == 3
    assert all(block._compiled_call_impl not in calls for block in model.local_blocks)
