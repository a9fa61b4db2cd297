"""Rotary position embedding: angles from positions, and the rotation itself (Su et al. 2021, section 3.4.2)."""

import math
from typing import Any

import torch
from torch import Tensor

from litgpt.model.config import Config

LENGTH_KINDS = ("dynamic", "longrope")
"""Values of `Config.rope_kind` with which frequencies depend on the length of the text."""


def build_angles(config: Config, positions: Tensor, *, rope: str = "global") -> tuple[Tensor, Tensor]:
    """Cosine and sine of every position's angles, in the layout of `apply_rotary`.

    Args:
        positions: (T,), (B, T) if rows differ, or (B, 3, T): of time, row and column, each for the pairs of
            `list_pair_axes` (Wang et al. 2024, Qwen2-VL, 2.1).
        rope: `global`, or `local` for the unscaled embedding of base `rope_local_base_freq`.

    Returns:
        two float32 tensors (..., 1, T, rotary_size), broadcast over heads; the sine of the first of two paired
        features is negative.
    """
    if rope == "local":
        assert config.rope_local_base_freq is not None
        frequencies, scale = compute_plain_frequencies(config, config.rope_local_base_freq, positions.device), 1.0
    else:
        frequencies, scale = compute_frequencies(config, positions)
    radians = positions.float()[..., None] * frequencies
    if positions.dim() == 3:
        axes = torch.tensor(list_pair_axes(config), device=radians.device)
        radians = radians.gather(1, axes.expand(len(radians), 1, radians.shape[2], -1))[:, 0]
    radians = radians.unsqueeze(-3)
    cos, sin = radians.cos() * scale, radians.sin() * scale
    return spread_pairs(cos, sin, interleave=config.rope_interleave)


def spread_pairs(cos: Tensor, sin: Tensor, *, interleave: bool) -> tuple[Tensor, Tensor]:
    """Cosine and sine of all features, (..., S), in the layout of `apply_rotary`, from those of pairs, (..., S / 2)."""
    if interleave:
        return cos.repeat_interleave(2, dim=-1), torch.stack([-sin, sin], dim=-1).flatten(-2)
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def list_pair_axes(config: Config) -> list[int]:
    """Whether each rotated pair is for time (0), row (1) or column (2): one section after the other, or in turn.

    In turn, all pairs after those of the shorter sections are for time.
    """
    sections = config.rope_sections
    assert sections is not None, "positions of time, row and column require rope_sections"
    if config.rope_section_order == "blocks":
        return [axis for axis, pairs in enumerate(sections) for _ in range(pairs)]
    return [pair % 3 if pair < 3 * sections[pair % 3] else 0 for pair in range(sum(sections))]


def compute_plain_frequencies(config: Config, base: float | Tensor, device: torch.device) -> Tensor:
    """Radians per position of each rotated pair, (rotary_size / 2,), in float32, without scaling."""
    size = config.rotary_size
    steps = torch.arange(0, size, 2, dtype=torch.float32, device=device)
    return 1.0 / (base ** (steps / size))


def compute_frequencies(config: Config, positions: Tensor) -> tuple[Tensor, float]:
    """Radians per position of each rotated pair, (rotary_size / 2,), and a factor on cosine and sine.

    Dynamic and longrope scaling depend on the sequence length: the maximum of `positions`, plus one.
    """
    plain = compute_plain_frequencies(config, config.rope_base, positions.device) / config.rope_condense_ratio
    rope = config.rope_adjustments
    if rope is None:
        return plain, 1.0
    if config.rope_kind == "dynamic":
        return compute_dynamic_frequencies(config, rope, positions), 1.0
    if config.rope_kind == "longrope":
        return compute_longrope_frequencies(plain, rope, positions), compute_longrope_strength(config, rope)
    if config.rope_kind == "yarn":
        return compute_yarn_frequencies(config, plain, rope), compute_yarn_strength(rope)
    if config.rope_kind == "llama3":
        return compute_llama3_frequencies(plain, rope), 1.0
    return plain / rope["factor"], 1.0


def compute_llama3_frequencies(plain: Tensor, rope: dict[str, Any]) -> Tensor:
    """Slow down long wavelengths, keep short ones, blend between (Llama 3.1 release, `apply_scaling`)."""
    rotations = rope["original_max_seq_len"] * plain / (2 * math.pi)  # over the original context length
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    blend = ((rotations - low) / (high - low)).clamp(0, 1)
    return (1 - blend) * plain / rope["factor"] + blend * plain


def compute_dynamic_frequencies(config: Config, rope: dict[str, Any], positions: Tensor) -> Tensor:
    """A base that grows with sequences beyond the original length (dynamic NTK; Peng et al. 2023, app. A.1)."""
    size, factor, first = config.rotary_size, rope["factor"], rope["original_max_seq_len"]
    length = (positions.max() + 1).clamp(min=first).float()
    growth = (factor * length / first - (factor - 1)) ** (size / (size - 2))
    return compute_plain_frequencies(config, config.rope_base * growth, positions.device)


def compute_longrope_frequencies(plain: Tensor, rope: dict[str, Any], positions: Tensor) -> Tensor:
    """A divisor for each pair, from one of two lists by sequence length (Ding et al. 2024)."""
    short, long = (torch.tensor(rope[key], device=plain.device) for key in ("short_factor", "long_factor"))
    return plain / torch.where(positions.max() + 1 > rope["original_max_seq_len"], long, short)


def compute_longrope_strength(config: Config, rope: dict[str, Any]) -> float:
    """The factor on cosine and sine: sqrt(1 + ln(growth) / ln(original length)) (Ding et al. 2024, section 3.3)."""
    if rope.get("attention_factor") is not None:
        return rope["attention_factor"]
    growth = rope.get("factor") or config.block_size / rope["original_max_seq_len"]
    return math.sqrt(1 + math.log(growth) / math.log(rope["original_max_seq_len"])) if growth > 1 else 1.0


def compute_yarn_frequencies(config: Config, plain: Tensor, rope: dict[str, Any]) -> Tensor:
    """Keep pairs of high frequency, slow down those of low frequency, blend between (Peng et al. 2023, eq. 23)."""
    size = config.rotary_size

    def find_pair(rotations: float) -> float:
        context = rope["original_max_seq_len"] / (rotations * 2 * math.pi)
        return size * math.log(context) / (2 * math.log(config.rope_base))

    low, high = find_pair(rope["beta_fast"]), find_pair(rope["beta_slow"])
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    pairs = torch.arange(size // 2, dtype=torch.float32, device=plain.device)
    slowed = ((pairs - low) / max(high - low, 1e-3)).clamp(0, 1)
    return plain / rope["factor"] * slowed + plain * (1 - slowed)


def compute_yarn_strength(rope: dict[str, Any]) -> float:
    """The factor on cosine and sine: 0.1 ln(factor) + 1 (Peng et al. 2023, eq. 22), or a ratio of two (DeepSeek-V2)."""
    if rope.get("attention_factor") is not None:
        return rope["attention_factor"]
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return compute_yarn_mscale(rope["factor"], rope["mscale"]) / compute_yarn_mscale(
            rope["factor"], rope["mscale_all_dim"]
        )
    return compute_yarn_mscale(rope["factor"], 1)


def compute_yarn_mscale(factor: float, scale: float) -> float:
    """0.1 scale ln(factor) + 1 if factor > 1, else 1."""
    return 0.1 * scale * math.log(factor) + 1 if factor > 1 else 1.0


def apply_rotary(x_BHTS: Tensor, cos: Tensor, sin: Tensor, *, interleave: bool = False) -> Tensor:
    """Rotate the first features of each head, as many as `cos` has, by position; (B, H, T, S).

    Feature i is paired with i + half of them, or with its neighbour if interleaved. Computed in float32 or float64: in
    bfloat16 the angle between two tokens would depend on their absolute positions.
    """
    size, rest = cos.shape[-1], None
    rotated = x_BHTS
    if x_BHTS.shape[-1] != size:
        rotated, rest = x_BHTS.split([size, x_BHTS.shape[-1] - size], dim=-1)
    if rotated.dtype != cos.dtype:
        rotated = rotated.to(torch.promote_types(rotated.dtype, cos.dtype))
    partner = rotated.unflatten(-1, (-1, 2)).flip(-1).flatten(-2) if interleave else rotated.roll(size // 2, -1)
    result = torch.addcmul(rotated * cos, partner, sin).to(x_BHTS.dtype)
    return result if rest is None else torch.cat([result, rest], dim=-1)
