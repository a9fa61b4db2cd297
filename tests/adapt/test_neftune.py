"""Noise on embeddings is that of the paper and of transformers, by document, and only while training."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from transformers.integrations.neftune import neftune_post_forward_hook

from litgpt.adapt.neftune import add_embedding_noise, add_uniform_noise
from litgpt.model.gpt import GPT
from tests.store.models import random_model, small

IDS = torch.randint(0, 50, (2, 16), generator=torch.Generator().manual_seed(1))
DOCUMENTS = torch.tensor([[0] * 4 + [1] * 9 + [-1] * 3, [0] * 16], dtype=torch.int32)
POSITIONS = torch.tensor([[*range(4), *range(9), *range(3)], [*range(16)]])


def twins(name: str = "Qwen2.5-0.5B", alpha: float = 5.0) -> tuple[GPT, GPT]:
    """A model without noise and one with noise."""
    plain = random_model(small(name)).train()
    disturbed = copy.deepcopy(plain)
    add_embedding_noise(disturbed, alpha)
    return plain, disturbed


def into_first_block(model: GPT, **named: Tensor) -> Tensor:
    """The hidden states (B, T, D) that the first block is given."""
    seen: list[Tensor] = []
    handle = model.blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model(IDS, **named)
    handle.remove()
    return seen[0].detach()


def test_noise_equals_transformers_for_the_same_seed() -> None:
    x = torch.randn(2, 16, 32)
    torch.manual_seed(0)
    expected = neftune_post_forward_hook(SimpleNamespace(training=True, neftune_noise_alpha=5.0), None, x)
    torch.manual_seed(0)
    torch.testing.assert_close(add_uniform_noise(x, 5.0, 16), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["Qwen2.5-0.5B", "Gemma-2b"])
def test_noise_is_uniform_and_shrinks_with_the_length_of_the_document(name: str) -> None:
    plain, disturbed = twins(name)
    named = {"documents_BT": DOCUMENTS, "positions_BT": POSITIONS}
    draws = [into_first_block(disturbed, **named) - into_first_block(plain, **named) for _ in range(40)]
    moved = torch.stack(draws).div(32**0.5 if name == "Gemma-2b" else 1)
    for row, places, length in ((0, slice(0, 4), 4), (0, slice(4, 13), 9), (1, slice(0, 16), 16)):
        part, most = moved[:, row, places], 5 / (length * 32) ** 0.5
        assert 0.99 * most < part.abs().max() <= most * 1.001
        assert abs(part.mean()) < 0.02 * most
        assert part.square().mean() == pytest.approx(most**2 / 3, rel=0.05)
        assert part.square().sum((1, 2)).mean() == pytest.approx(25 / 3, rel=0.05)
    assert (draws[0] != draws[1]).all()


def test_a_row_without_documents_is_one_document() -> None:
    plain, disturbed = twins()
    moved = torch.stack([into_first_block(disturbed) - into_first_block(plain) for _ in range(10)])
    most = 5 / (16 * 32) ** 0.5
    assert 0.99 * most < moved.abs().max() <= most * 1.001


def test_no_noise_outside_of_training() -> None:
    plain, disturbed = twins()
    assert torch.equal(disturbed.eval()(IDS), plain.eval()(IDS))
    assert not torch.equal(disturbed.train()(IDS), plain.train()(IDS))


def test_noise_is_drawn_from_the_default_generator_and_keeps_bfloat16() -> None:
    _, disturbed = twins()
    disturbed.bfloat16()
    outputs = []
    for _ in range(2):
        torch.manual_seed(7)
        outputs.append(disturbed(IDS))
    assert torch.equal(*outputs) and outputs[0].dtype == torch.bfloat16
    assert not torch.equal(outputs[0], disturbed(IDS))
