"""The gradients of a model with a tower against those of transformers."""

from typing import Any

import torch
from torch import Tensor

from litgpt.model.config import Config
from litgpt.model.gpt import GPT
from litgpt.model.registry import find_family


def compare_gradients(model: GPT, hf_model: Any, actual: Tensor, expected: Tensor, config: Config) -> list[str]:
    """Compare the gradients of all parameters, under the published names; returns the names of those without any."""
    family = find_family(config)
    assert family is not None
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2)) / expected.shape[1]
    (actual * weights).sum().backward()
    (expected * weights).sum().backward()
    theirs: dict[str, Tensor | None] = {}
    for name, parameter in hf_model.named_parameters():
        is_published = family.tensors.map_hf_name(name, config) is not None
        theirs |= {name: parameter.grad} if is_published else split_experts(name, parameter.grad)
    compared, without = 0, []
    for hf_name, gradient in theirs.items():
        mapping = family.tensors.map_hf_name(hf_name, config)
        assert mapping is not None, hf_name
        ours = [model.get_parameter(name).grad for name in mapping.names]
        if mapping.expert is not None:
            ours = [each if each is None else each[mapping.expert] for each in ours]
        if gradient is None:
            assert all(each is None for each in ours), hf_name
            without += mapping.names
            continue
        for each, part in zip(ours, mapping.split(gradient, config), strict=True):
            torch.testing.assert_close(each, part, atol=1e-5, rtol=1e-5, msg=lambda text, name=hf_name: name + text)
            compared += 1
    assert compared > 40
    return without


def split_experts(name: str, gradient_EOI: Tensor) -> dict[str, Tensor]:
    """The gradients of each expert's matrices, under the published names, of those that transformers joins."""
    start, _, joined = name.rpartition(".")
    parts = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}[joined]
    return {
        f"{start}.{expert}.{part}.weight": gradient
        for expert, gradient_OI in enumerate(gradient_EOI)
        for part, gradient in zip(parts, gradient_OI.chunk(len(parts)), strict=True)
    }
