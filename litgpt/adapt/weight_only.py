"""Linear layers with weights in 8 or 4 bits and inputs in full precision, for inference; they need no package.

Axes: R rows, K inputs, N outputs, G groups of inputs.
"""

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

INT4_GROUP = 32
"""The number of weights of a row that share a scale and a center in 4 bits; torch's kernel has 32, 64, 128 and 256."""


class WeightOnlyLinear(nn.Module, ABC):
    """A linear layer with quantized weights.

    Few rows are multiplied on a CPU by torch's kernel for such weights; otherwise the matrix is dequantized for the
    product.
    """

    kernel_rows: int
    """The number of rows up to which the kernel is used: for more, dequantizing the matrix takes less time."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bias = layer.in_features, layer.out_features, layer.bias

    def forward(self, x: Tensor) -> Tensor:
        """Multiply by the weight and add the bias; (..., K) -> (..., N)."""
        rows = x.numel() // self.in_features
        if 0 < rows <= self.kernel_rows and x.device.type == "cpu" and self.has_kernel(x.dtype):
            y = self.multiply_few(x.reshape(rows, self.in_features)).view(*x.shape[:-1], self.out_features)
        else:
            y = self.multiply_many(x)
        return y if self.bias is None else y + self.bias

    @abstractmethod
    def has_kernel(self, dtype: torch.dtype) -> bool:
        """Whether torch has a CPU kernel for the layer's sizes and inputs of this type."""

    @abstractmethod
    def multiply_few(self, x_RK: Tensor) -> Tensor:
        """The product by the kernel, (R, N)."""

    @abstractmethod
    def multiply_many(self, x: Tensor) -> Tensor:
        """The product with the dequantized matrix, (..., K) -> (..., N)."""


class Int8Linear(WeightOnlyLinear):
    """The weight is `weight` (N, K) in int8 times `scale` (N,), the 127th part of each largest value."""

    kernel_rows = 8
    weight: Tensor
    scale: Tensor

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer)
        exact = layer.weight.detach().float()
        scale = exact.abs().amax(1).clamp(min=1e-30) / 127
        self.register_buffer("weight", (exact / scale[:, None]).round().to(torch.int8))
        self.register_buffer("scale", scale.to(layer.weight.dtype))

    def has_kernel(self, dtype: torch.dtype) -> bool:
        """For bfloat16, and multiples of 16 inputs: with others, the kernel reads memory that is not its own."""
        return dtype == torch.bfloat16 and self.in_features % 16 == 0

    def multiply_few(self, x_RK: Tensor) -> Tensor:
        """As `WeightOnlyLinear.multiply_few`."""
        return torch._weight_int8pack_mm(x_RK, self.weight, self.scale)

    def multiply_many(self, x: Tensor) -> Tensor:
        """As `WeightOnlyLinear.multiply_many`."""
        return F.linear(x, self.weight.to(x.dtype)) * self.scale


class Int4Linear(WeightOnlyLinear):
    """Weights in 4 bits: code c of a group stands for (c - 8) scale + center, from the group's least to largest weight.

    `codes` are (N, K / 2) in uint8, two a byte, the first in the low bits; K is rounded up to whole groups. `scales`
    are (G, N, 2), scale and center. The kernel needs the codes in an order of its own, which is a second copy of them.
    """

    kernel_rows = 64
    codes: Tensor
    scales: Tensor

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer)
        padding = -self.in_features % INT4_GROUP
        groups_NGK = F.pad(layer.weight.detach().float(), (0, padding)).unflatten(1, (-1, INT4_GROUP))
        least, largest = groups_NGK.aminmax(dim=-1, keepdim=True)
        scale = ((largest - least) / 15).clamp(min=1e-30)
        codes = ((groups_NGK - least) / scale).round().clamp(0, 15).to(torch.uint8).flatten(1)
        self.register_buffer("codes", codes[:, ::2] | codes[:, 1::2] << 4)
        scales_NG2 = torch.cat([scale, least + 8 * scale], -1)
        self.register_buffer("scales", scales_NG2.transpose(0, 1).to(layer.weight.dtype).contiguous())
        self._kernel_codes: Tensor | None = None

    def has_kernel(self, dtype: torch.dtype) -> bool:
        """For scales of the same type, whole groups, and multiples of 16 outputs."""
        return dtype == self.scales.dtype and self.in_features % INT4_GROUP == 0 and self.out_features % 16 == 0

    def multiply_few(self, x_RK: Tensor) -> Tensor:
        """As `WeightOnlyLinear.multiply_few`."""
        if self._kernel_codes is None:
            self._kernel_codes = torch._convert_weight_to_int4pack_for_cpu(self._unpack().to(torch.int32), 1)
        return torch._weight_int4pack_mm_for_cpu(x_RK, self._kernel_codes, INT4_GROUP, self.scales)

    def multiply_many(self, x: Tensor) -> Tensor:
        """As `WeightOnlyLinear.multiply_many`."""
        scale_NG1, center_NG1 = self.scales.to(x.dtype).transpose(0, 1).split(1, -1)
        groups_NGK = (self._unpack().to(x.dtype) - 8).unflatten(1, (-1, INT4_GROUP))
        return F.linear(x, torch.addcmul(center_NG1, groups_NGK, scale_NG1).flatten(1)[:, : self.in_features])

    def _unpack(self) -> Tensor:
        """The codes, 0 to 15, (N, K)."""
        return torch.stack([self.codes & 15, self.codes >> 4], -1).flatten(1)
