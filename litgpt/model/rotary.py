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
    """Cosine and sine of every position's angles, laid out for `rotate`.

    Args:
        positions: (T,), or (B, T) where rows differ.

    Returns:
        two float32 tensors (..., 1, T, rotary_size), the 1 standing for heads; the sine of the first half is negative.
    """
    radians = (positions.float()[..., None] * frequencies(config, positions.device)).unsqueeze(-3)
    cos, sin = radians.cos(), radians.sin()
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def rotate(x_BHTS: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first numbers of each head, as many as `cos` has, by position; number i pairs with i + half of them.

    Computed in float32 at least: in bfloat16 the angle between two tokens would depend on where they stand.
    """
    size = cos.shape[-1]
    turning, rest = x_BHTS.split([size, x_BHTS.shape[-1] - size], dim=-1)
    turning = turning.to(torch.promote_types(turning.dtype, cos.dtype))
    turned = torch.addcmul(turning * cos, turning.roll(size // 2, dims=-1), sin).to(x_BHTS.dtype)
    return torch.cat([turned, rest], dim=-1) if rest.shape[-1] else turned
