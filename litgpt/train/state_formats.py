"""Formats of optimizer states: float32 values in four bytes or fewer."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from litgpt.model.torchao import import_torchao
from litgpt.train.stochastic_rounding import Noise, round_root_stochastically, round_stochastically


class StoredTensor(NamedTuple):
    """A tensor that holds a state or a part of it.

    Attributes:
        dtype: its data type.
        values: the number of values that one of its elements along the last dim stands for.
        is_scale: whether its elements are scales, which may be repeated.
    """

    dtype: torch.dtype
    values: int = 1
    is_scale: bool = False


Stored = dict[str, Tensor]
"""The tensors of a state by suffix: codes under "", and scales."""


class StateFormat(Protocol):
    """How the values of a state are stored."""

    @property
    def block(self) -> int:
        """The most values that share a scale; 1 without scales."""
        ...

    def list_tensors(self, block: int) -> dict[str, StoredTensor]:
        """The tensors of a state by suffix, for blocks of values that share a scale."""
        ...

    def read(self, stored: Stored, *, signed: bool) -> Tensor:
        """The values in float32, in place if they are stored so."""
        ...

    def write(self, stored: Stored, values: Tensor, noise: Noise, *, signed: bool) -> None:
        """Store float32 values.

        Args:
            noise: random numbers for the elements.
            signed: False for a second moment.
        """
        ...


@dataclass(frozen=True)
class PlainFormat:
    """float32, or bfloat16 with stochastic rounding; without scales."""

    dtype: torch.dtype
    block: int = 1

    def list_tensors(self, block: int) -> dict[str, StoredTensor]:
        """One tensor of this type."""
        del block
        return {"": StoredTensor(self.dtype)}

    def read(self, stored: Stored, *, signed: bool) -> Tensor:
        """The values in float32, in place if they are stored so."""
        del signed
        return stored[""].float()

    def write(self, stored: Stored, values: Tensor, noise: Noise, *, signed: bool) -> None:
        """Store float32 values, rounded."""
        del signed
        if self.dtype != torch.float32:
            stored[""].copy_(round_to_bfloat16(values, noise))


def round_to_bfloat16(values: Tensor, noise: Noise) -> Tensor:
    """Round float32 values to numbers of bfloat16, stochastically."""
    return round_stochastically(values, noise.draw(), mantissa_bits=7, smallest=2.0**-100)  # 2^-126 would underflow


@dataclass(frozen=True)
class ScaledFormat:
    """A floating-point format whose blocks of values have a power of two as their scale, in the last dim.

    The largest value of a block gets the exponent `largest_exponent`. Exponents take one byte, as in the microscaling
    formats (Open Compute Project 2023). Second moments are stored as their roots, which halves the range of exponents.

    Attributes:
        mantissa_bits: as in `compute_spacing`.
        smallest: as in `compute_spacing`.
        block: number of values that share a scale.
    """

    dtype: torch.dtype
    mantissa_bits: int
    smallest: float
    largest_exponent: int
    block: int = 32

    def list_tensors(self, block: int) -> dict[str, StoredTensor]:
        """Codes, and an exponent of two for every block."""
        return {"": StoredTensor(self.dtype), "_exponent": StoredTensor(torch.int8, block, True)}

    def read(self, stored: Stored, *, signed: bool) -> Tensor:
        """The values in float32."""
        codes, exponents = stored[""], stored["_exponent"]
        values = to_float32(codes).unflatten(-1, (exponents.shape[-1], -1)).mul_(power_of_two(exponents).unsqueeze(-1))
        values = values.flatten(-2)
        return values if signed else values.square_()

    def write(self, stored: Stored, values: Tensor, noise: Noise, *, signed: bool) -> None:
        """Store float32 values, rounded."""
        exponents = stored["_exponent"]
        values = values if signed else values.sqrt()
        blocks = values.unflatten(-1, (exponents.shape[-1], -1))
        exponents.copy_(get_exponent(blocks.abs().amax(-1)).sub_(self.largest_exponent).clamp_(-126, 126))
        scaled = (blocks * power_of_two(-exponents).unsqueeze(-1)).flatten(-2)
        rounding: Callable[..., Tensor] = round_stochastically if signed else round_root_stochastically
        stored[""].copy_(rounding(scaled, noise.draw(), mantissa_bits=self.mantissa_bits, smallest=self.smallest))


def get_exponent(values: Tensor) -> Tensor:
    """The exponent of float32 values above zero, int32: floor(log2(x)); -127 for zero and subnormal numbers."""
    return (values.contiguous().view(torch.int32) >> 23) - 127


def power_of_two(exponents: Tensor) -> Tensor:
    """2 to the power of integers from -126 to 127, exact in float32."""
    return ((exponents.to(torch.int32) + 127) << 23).view(torch.float32)


def to_float32(codes: Tensor) -> Tensor:
    """A copy in float32; by a table for types of one byte, which torch converts slowly on CPUs."""
    if codes.element_size() > 1:
        return codes.to(torch.float32, copy=True)
    return build_table(codes.dtype, codes.device)[codes.view(torch.uint8).int()]


@cache
def build_table(dtype: torch.dtype, device: torch.device) -> Tensor:
    """The value of every code of a type of one byte."""
    return torch.arange(256, dtype=torch.uint8, device=device).view(dtype).float()


@dataclass(frozen=True)
class TorchaoFormat:
    """Codes of 8 or 4 bits for the numbers of a table, with a float32 scale for every block (torchao.optim).

    8 bits: Dettmers et al. 2022 (arXiv 2110.02861); 4 bits: Li et al. 2023 (arXiv 2309.01507). Rounded to nearest.

    Attributes:
        block: number of values that share a scale.
    """

    bits: int
    block: int = 128

    def list_tensors(self, block: int) -> dict[str, StoredTensor]:
        """Codes, two in a byte if they have 4 bits, and scales."""
        return {"": StoredTensor(torch.uint8, 8 // self.bits), "_scale": StoredTensor(torch.float32, block, True)}

    def read(self, stored: Stored, *, signed: bool) -> Tensor:
        """The values in float32."""
        return self._wrap(stored, signed=signed).dequantize()

    def write(self, stored: Stored, values: Tensor, noise: Noise, *, signed: bool) -> None:
        """Store float32 values, rounded."""
        del noise
        self._wrap(stored, signed=signed).copy_(values.contiguous())

    def _wrap(self, stored: Stored, *, signed: bool) -> Any:
        codes, scale = stored[""], stored["_scale"].view(-1)
        module, table = import_state_class(self.bits), build_torchao_table(self.bits, signed, codes.device)
        if self.bits == 8:
            return module.OptimState8bit(codes, scale, table, signed)
        shape = (*codes.shape[:-1], codes.shape[-1] * 2)
        return module.OptimState4bit(codes.view(-1), scale, table, signed, shape)


def import_state_class(bits: int) -> Any:
    """The module of torchao for codes of 8 or 4 bits.

    Raises:
        UserError: if torchao is not installed.
    """
    return import_torchao(f"optim.subclass_{bits}bit", f"optimizer: states of {bits}bit need", "use fp8")


@cache
def build_torchao_table(bits: int, signed: bool, device: torch.device) -> Tensor:
    """The numbers that the codes stand for."""
    module = import_state_class(bits)
    numbers = module.get_qmap_signed() if signed else module.get_qmap_unsigned()
    return torch.tensor(numbers, dtype=torch.float32, device=device)


FLOAT32 = PlainFormat(torch.float32)
FORMATS: dict[str, StateFormat] = {
    "fp32": FLOAT32,
    "bf16": PlainFormat(torch.bfloat16),
    "fp16": ScaledFormat(torch.float16, 10, smallest=2.0**-14, largest_exponent=14),
    "fp8": ScaledFormat(torch.float8_e4m3fn, 3, smallest=2.0**-6, largest_exponent=7),
    "8bit": TorchaoFormat(8),
    "4bit": TorchaoFormat(4),
}


def get_format(name: str) -> StateFormat:
    """The format of a name in `FORMATS`.

    Raises:
        UserError: if it needs torchao, which is not installed.
    """
    state_format = FORMATS[name]
    if isinstance(state_format, TorchaoFormat):
        import_state_class(state_format.bits)
    return state_format
