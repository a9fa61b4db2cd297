"""Linear layers with weights in 8 bits and inputs in full precision, for inference; they need no package."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

KERNEL_ROWS = 8  # measured: for more rows, dequantizing the matrix takes less time than the kernel
KERNEL_MULTIPLE = 16  # of the input width; the kernel reads memory that is not its own with others


class Int8Linear(nn.Module):
    """A linear layer whose weight is `weight` (N, K) in int8 times `scale` (N,), the 127th part of each largest value.

    Few rows in bfloat16 are multiplied on a CPU by torch's kernel for such weights; otherwise the matrix is dequantized
    for the product.
    """

    weight: Tensor
    scale: Tensor

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        exact = layer.weight.detach().float()
        scale = exact.abs().amax(1).clamp(min=1e-30) / 127
        self.register_buffer("weight", (exact / scale[:, None]).round().to(torch.int8))
        self.register_buffer("scale", scale.to(layer.weight.dtype))
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        """Multiply by the weight and add the bias; (..., K) -> (..., N)."""
        rows = x.numel() // self.in_features
        has_kernel = x.device.type == "cpu" and x.dtype == torch.bfloat16 and self.in_features % KERNEL_MULTIPLE == 0
        if has_kernel and 0 < rows <= KERNEL_ROWS:
            flat = x.reshape(rows, self.in_features)
            y = torch._weight_int8pack_mm(flat, self.weight, self.scale).view(*x.shape[:-1], self.out_features)
        else:
            y = F.linear(x, self.weight.to(x.dtype)) * self.scale
        return y if self.bias is None else y + self.bias
