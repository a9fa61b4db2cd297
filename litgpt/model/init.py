"""Initialization: each parameter is drawn from its own generator, so that values do not depend on the layout."""

import hashlib
import math
from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from litgpt.model.config import Config
from litgpt.model.gpt import GPT

Writer = Callable[[Tensor, Tensor], None]
"""Stores a full value into a parameter, which may keep only a part of it."""


def copy_into(parameter: Tensor, value: Tensor) -> None:
    """Overwrite a plain parameter in place."""
    parameter.copy_(value)


@torch.no_grad()
def initialize(model: GPT, seed: int, *, write: Writer = copy_into, names: Collection[str] | None = None) -> None:
    """Initialize every parameter, as a function of the seed and its name only.

    Args:
        write: stores a full value in a parameter, which may keep a part of it.
        names: of the parameters to initialize; None for all.
    """
    for name, parameter in model.named_parameters():
        if names is not None and name not in names:
            continue
        write(parameter, draw_init_value(model.config, name, parameter.shape, seed))


def draw_init_value(config: Config, name: str, shape: Sequence[int], seed: int) -> Tensor:
    """The initial value of a parameter, in float32 on the CPU."""
    owner, kind = name.split(".")[-2:]
    if kind in ("correction", "sinks") or kind.endswith("bias"):
        return torch.zeros(tuple(shape))
    if kind in ("scale_1", "scale_2"):
        return torch.ones(tuple(shape))
    if owner.startswith("norm"):
        return torch.full(tuple(shape), float(not has_offset(config, name)))
    part = owner if kind == "weight" else kind  # experts.down is a tensor, shared.down a module
    return torch.empty(tuple(shape)).normal_(0, compute_std(config, part), generator=seeded_generator(f"{seed}/{name}"))


def has_offset(config: Config, name: str) -> bool:
    """Whether the weight of a norm is added to one."""
    if name.startswith("audio."):
        return False
    if not name.startswith("vision."):
        return config.norm_class_name.startswith("Offset")
    assert config.vision is not None
    return name.startswith("vision.projector.") and config.vision["projector_norm"].startswith("offset")


def seeded_generator(seed: str) -> torch.Generator:
    """A CPU generator whose state is a function of a text."""
    digest = hashlib.sha256(seed.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big", signed=True))


def compute_std(config: Config, part: str) -> float:
    """Standard deviation of a weight: sqrt(2 / (5 width)) (Nguyen and Salazar 2019), 1 / (sqrt(width) layers) for the
    layers whose outputs are added to the residual stream, and 1 / sqrt(width + 1) for scores (Stiennon et al. 2020)."""
    if part == "score":
        return 1 / math.sqrt(config.n_embd + 1)
    if part == "out" or (part == "down" and config.mlp_class_name != "GptNeoxMLP"):
        return 1 / (math.sqrt(config.n_embd) * config.n_layer)
    return math.sqrt(2 / (5 * config.n_embd))
