"""First values of the parameters: each from a generator of its own, so that no layout changes them."""

import hashlib
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from litgpt.model.config import Config
from litgpt.model.gpt import GPT


def copy_into(parameter: nn.Parameter, value: Tensor) -> None:
    """Overwrite a plain parameter in place."""
    parameter.copy_(value)


@torch.no_grad()
def initialize(model: GPT, seed: int, *, write: Callable[[nn.Parameter, Tensor], None] = copy_into) -> None:
    """Give every parameter its first value, a function of the seed and the parameter's name alone.

    Args:
        write: stores a full value into a parameter; one that keeps only this rank's part serves sharded models.
    """
    for name, parameter in model.named_parameters():
        write(parameter, full_tensor_for(model.config, name, parameter.shape, seed))


def full_tensor_for(config: Config, name: str, shape: Sequence[int], seed: int) -> Tensor:
    """The first value of the named parameter, whole, in float32 on the CPU."""
    owner, kind = name.split(".")[-2:]
    if kind in ("correction", "sinks") or kind.endswith("bias"):
        return torch.zeros(tuple(shape))
    if owner.startswith("norm"):
        return torch.full(tuple(shape), float(not config.norm_class_name.startswith("Offset")))
    key = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "big", signed=True))
    part = owner if kind == "weight" else kind  # experts.down is a tensor, shared.down a module
    return torch.empty(tuple(shape)).normal_(0, deviation(config, part), generator=generator)


def deviation(config: Config, part: str) -> float:
    """Standard deviation of a weight: sqrt(2 / (5 width)) (Nguyen and Salazar 2019), and 1 / (sqrt(width) layers) for
    the layers whose outputs add up along the residual stream."""
    adds_up = part == "out" or (part == "down" and config.mlp_class_name != "GptNeoxMLP")
    if adds_up:
        return 1 / (math.sqrt(config.n_embd) * config.n_layer)
    return math.sqrt(2 / (5 * config.n_embd))
