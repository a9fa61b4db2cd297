"""Stochastic rounding of float32 values, with random numbers that depend neither on the layout nor on the device.

The random number of an element is a hash of its position in the full tensor, of the step and of a name, so that a run
that is resumed, or laid out in another way, rounds the same values in the same way.
"""

from functools import cached_property

import torch
from torch import Tensor

MULTIPLIERS = (-2048144789, -1028477387)  # 0x85ebca6b and 0xc2b2ae35: the finalizer of MurmurHash3 (Appleby 2011)
GOLDEN = 0x9E3779B9  # 2^32 / golden ratio
SIXTEEN_BITS = 0xFFFF


class Noise:
    """Uniform random numbers for the elements of a block of a tensor; every call of `draw` gives new ones.

    Args:
        shape: of the block.
        offset: of the block in the full tensor.
        full_shape: of the full tensor.
        seed: any integer.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        offset: tuple[int, ...],
        full_shape: tuple[int, ...],
        seed: int,
        device: torch.device,
    ) -> None:
        self.shape, self.offset, self.full_shape = shape, offset, full_shape
        self.seed, self.device = seed, device
        self.number = 0

    @cached_property
    def index(self) -> Tensor:
        """The position of every element in the full tensor, modulo 2^32."""
        index = torch.zeros((), dtype=torch.int32, device=self.device)
        stride = 1
        for dim in reversed(range(len(self.shape))):
            steps = torch.arange(self.shape[dim], dtype=torch.int32, device=self.device) * wrap_int32(stride)
            start = wrap_int32(self.offset[dim] * stride)
            index = index + (steps + start).view(-1, *[1] * (len(self.shape) - 1 - dim))
            stride *= self.full_shape[dim]
        return index

    def draw(self) -> Tensor:
        """Random numbers in (0, 1) of 16 bits, in the shape of the block."""
        if self.number % 2 == 0:
            self.bits = hash_int32(self.index, self.seed + self.number // 2 * GOLDEN)
            bits = self.bits & SIXTEEN_BITS
        else:
            bits = (self.bits >> 16) & SIXTEEN_BITS
        self.number += 1
        return bits.float().add_(0.5).mul_(2.0**-16)


def wrap_int32(value: int) -> int:
    """An integer modulo 2^32, as a signed one."""
    return (value + 2**31) % 2**32 - 2**31


def hash_int32(values: Tensor, seed: int) -> Tensor:
    """Hash integers to 32 random bits."""
    bits = values * wrap_int32(GOLDEN) + wrap_int32(seed)
    for shift, multiplier in zip((16, 13), MULTIPLIERS, strict=True):
        bits ^= (bits >> shift) & (2 ** (32 - shift) - 1)  # >> copies the sign
        bits *= multiplier
    bits ^= (bits >> 16) & SIXTEEN_BITS
    return bits


def compute_spacing(values: Tensor, mantissa_bits: int, smallest: float) -> Tensor:
    """The distance between neighboring numbers of a floating-point format.

    Args:
        values: float32.
        mantissa_bits: without the implicit one.
        smallest: normal number of the format; below it numbers have equal distances.
    """
    powers = (values.contiguous().view(torch.int32) & 0x7F800000).view(torch.float32)
    return powers.clamp_(min=smallest).mul_(2.0**-mantissa_bits)


def split_into_steps(values: Tensor, mantissa_bits: int, smallest: float) -> tuple[Tensor, Tensor, Tensor]:
    """The next lower number of a format and the rest, both in units of the spacing there, and this spacing."""
    spacing = compute_spacing(values, mantissa_bits, smallest)
    position = values / spacing
    lower = position.floor()
    return lower, position.sub_(lower), spacing


def round_stochastically(values: Tensor, noise: Tensor, *, mantissa_bits: int, smallest: float) -> Tensor:
    """Round float32 values down or up to a neighboring number of a format, so that the expected value is unchanged.

    Args:
        noise: random numbers in (0, 1).
        mantissa_bits: as in `compute_spacing`.
        smallest: as in `compute_spacing`.
    """
    lower, fraction, spacing = split_into_steps(values, mantissa_bits, smallest)
    return lower.add_(noise < fraction).mul_(spacing)


def round_root_stochastically(values: Tensor, noise: Tensor, *, mantissa_bits: int, smallest: float) -> Tensor:
    """Round roots so that the expected value of their squares is unchanged; roots above zero stay above it.

    A second moment that is rounded to zero would make the update of AdamW as large as 1 / eps (Li et al. 2023, arXiv
    2309.01507, section 4.1).

    Args:
        values: float32, none below zero.
        noise: random numbers in (0, 1).
        mantissa_bits: as in `compute_spacing`.
        smallest: as in `compute_spacing`.
    """
    lower, fraction, spacing = split_into_steps(values, mantissa_bits, smallest)
    # (x^2 - lower^2) / (upper^2 - lower^2) in units of the spacing
    probability = fraction * (2 * lower + fraction) / (2 * lower + 1)
    rounded = lower.add_(noise < probability).clamp_(min=1).mul_(spacing)
    return rounded.masked_fill_(values == 0, 0.0)
