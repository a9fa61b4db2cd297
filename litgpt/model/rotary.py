"""Rotary position embedding: angles from positions, and the rotation itself (Su et al. 2021, section 3.4.2)."""

import math

import torch
from torch import Tensor

from litgpt.model.config import Config


def frequencies(config: Config, device: torch.device) -> Tensor:
    """Radians per position of each rotated pair, (rotary_size / 2,), in float32."""
    size = config.rotary_size
    steps = torch.arange(0, size, 2, dtype=torch.float32, device=device)
    plain = 1.0 / (config.rope_base ** (steps / size)) / config.rope_condense_ratio
    rope = config.rope_adjustments
    if rope is None:
        return plain
    if "low_freq_factor" not in rope:
        return plain / rope["factor"]
    return llama3_frequencies(plain, rope)


def llama3_frequencies(plain: Tensor, rope: dict[str, float]) -> Tensor:
    """Slow down long wavelengths, keep short ones, blend between (Llama 3.1 release, `apply_scaling`)."""
    turns = rope["original_max_seq_len"] * plain / (2 * math.pi)  # over the context the model was first trained on
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    share = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - share) * plain / rope["factor"] + share * plain


def angles(config: Config, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every position's angles.

    Args:
        positions: (T,), or (B, T) where rows differ.

    Returns:
        two float32 tensors (..., 1, T, rotary_size / 2), the 1 standing for heads.
    """
    radians = positions.float()[..., None] * frequencies(config, positions.device)
    radians = radians.unsqueeze(-3)
    return radians.cos(), radians.sin()


def rotate(x_BHTS: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first `2 * cos.shape[-1]` numbers of each head by its position; halves are the pairs."""
    half = cos.shape[-1]
    cos, sin = cos.to(x_BHTS.dtype), sin.to(x_BHTS.dtype)
    first, second, rest = x_BHTS.split([half, half, x_BHTS.shape[-1] - 2 * half], dim=-1)
    turned = [first * cos - second * sin, second * cos + first * sin]
    return torch.cat(turned + [rest] * bool(rest.shape[-1]), dim=-1)
