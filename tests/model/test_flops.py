"""The formula for operations against a count of the operations that run."""

from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from litgpt.model.config import Config
from litgpt.model.flops import training_flops
from litgpt.model.gpt import GPT

LLAMA = {"norm_class_name": "RMSNorm", "mlp_class_name": "LLaMAMLP", "intermediate_size": 96, "bias": False}


@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": True}, {**LLAMA, "n_query_groups": 2, "head_size": 24}])
def test_formula_equals_the_count(changes: dict[str, Any]) -> None:
    config = Config(**{"n_layer": 2, "n_embd": 64, "n_head": 4, "padded_vocab_size": 128, **changes})
    model = GPT(config)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(torch.zeros(2, 32, dtype=torch.int64)).sum().backward()
    # The counter sees the whole score matrix; the formula counts the half that the causal mask leaves.
    unmasked = 6 * config.n_layer * config.n_head * config.head_size * 32 * 64
    assert counter.get_total_flops() == training_flops(config, tokens=64, sequence_length=32) + unmasked


def test_published_size_of_a_known_model() -> None:
    config = Config.from_name("tiny-llama-1.1b")
    per_token = training_flops(config, tokens=1, sequence_length=2048)
    weights = 1_100_048_384 - 32000 * 2048 - 45 * 2048  # without the looked-up embedding and the norms
    assert per_token == 6 * weights + 6 * 22 * 2048 * 2048
