"""Master weights of an optimizer, in formats of their own."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from litgpt.train.state_formats import FORMATS, StateFormat, Stored, StoredTensor, round_to_bfloat16
from litgpt.train.stochastic_rounding import Noise


class MasterFormat(Protocol):
    """How the values of a weight are stored between steps."""

    @property
    def block(self) -> int:
        """The most values that share a scale; 1 without scales."""
        ...

    def list_tensors(self, block: int) -> dict[str, StoredTensor]:
        """The tensors beside the weight, as in `StateFormat`."""
        ...

    def start(self, weight: Tensor, stored: Stored, noise: Noise) -> None:
        """Fill the tensors of a new state."""
        ...

    def read(self, weight: Tensor, stored: Stored) -> Tensor:
        """The values in float32, in place if they are stored so."""
        ...

    def write(self, weight: Tensor, stored: Stored, values: Tensor, noise: Noise) -> None:
        """Store float32 values, and round them to the weight."""
        ...


class NoMaster:
    """No tensors beside the weight, which is float32, or is rounded stochastically."""

    block = 1

    def list_tensors(self, block: int) -> dict[str, StoredTensor]:
        """No tensors."""
        del block
        return {}

    def start(self, weight: Tensor, stored: Stored, noise: Noise) -> None:
        """Do nothing."""

    def read(self, weight: Tensor, stored: Stored) -> Tensor:
        """The weight in float32."""
        del stored
        return weight.float()

    def write(self, weight: Tensor, stored: Stored, values: Tensor, noise: Noise) -> None:
        """Round the values to the weight."""
        del stored
        if weight.dtype == torch.bfloat16:
            weight.copy_(round_to_bfloat16(values, noise))


class Remainder:
    """The lower 16 bits of a float32 number beside the weight in bfloat16, which is its rounded upper half."""

    block = 1

    def list_tensors(self, block: int) -> dict[str, StoredTensor]:
        """Signed remainders."""
        del block
        return {"": StoredTensor(torch.int16)}

    def start(self, weight: Tensor, stored: Stored, noise: Noise) -> None:
        """The remainder of a weight in bfloat16 is zero, as a new state is."""

    def read(self, weight: Tensor, stored: Stored) -> Tensor:
        """The sum of both halves."""
        upper = weight.view(torch.int16).to(torch.int32) << 16
        return (upper + stored[""]).view(torch.float32)

    def write(self, weight: Tensor, stored: Stored, values: Tensor, noise: Noise) -> None:
        """Split float32 numbers."""
        del noise
        bits = values.contiguous().view(torch.int32)
        upper = (bits + 2**15) >> 16  # rounds to nearest, as the format keeps sign and magnitude
        weight.view(torch.int16).copy_(upper)
        stored[""].copy_(bits - (upper << 16))


@dataclass(frozen=True)
class MasterCopy:
    """A copy of the weight in the format of a state."""

    format: StateFormat

    @property
    def block(self) -> int:
        """Number of values that share a scale."""
        return self.format.block

    def list_tensors(self, block: int) -> dict[str, StoredTensor]:
        """Those of the format."""
        return self.format.list_tensors(block)

    def start(self, weight: Tensor, stored: Stored, noise: Noise) -> None:
        """Copy the weight."""
        self.format.write(stored, weight.float(), noise, signed=True)

    def read(self, weight: Tensor, stored: Stored) -> Tensor:
        """The values of the copy."""
        del weight
        return self.format.read(stored, signed=True)

    def write(self, weight: Tensor, stored: Stored, values: Tensor, noise: Noise) -> None:
        """Store the values, and round them to nearest."""
        self.format.write(stored, values, noise, signed=True)
        weight.copy_(values)


NO_MASTER = NoMaster()
REMAINDER = Remainder()
MASTERS: dict[str | None, MasterFormat] = {
    None: NO_MASTER,
    "fp32": REMAINDER,
    "fp16": MasterCopy(FORMATS["fp16"]),
    "fp8": MasterCopy(FORMATS["fp8"]),
}
