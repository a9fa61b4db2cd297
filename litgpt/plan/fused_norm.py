"""The RMS norm that accelerators compute in one kernel, for tensors on the CPU.

On the CPU, `torch.nn.functional.rms_norm` is a chain of operations in float32 whose results are saved for the backward
pass. On CUDA it is one operation, which saves its input and a number per row.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx

rms_norm_on_cpu = F.rms_norm


@torch.library.custom_op("litgpt::fused_rms_norm", mutates_args=())
def normalize(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The norm over the last dim (Zhang and Sennrich 2019, eq. 4), and the reciprocal of the root mean square.

    Args:
        x: (..., D).
        weight: (D,).

    Returns:
        (..., D) in the type of x, and (..., 1), in float32 or wider.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    reciprocal = (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
    return (wide * reciprocal * weight).to(x.dtype), reciprocal


@normalize.register_fake
def _(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(x.dtype, torch.float32)
    return torch.empty_like(x), x.new_empty((*x.shape[:-1], 1), dtype=wide)


@torch.library.custom_op("litgpt::fused_rms_norm_backward", mutates_args=())
def compute_gradients(grad: Tensor, x: Tensor, weight: Tensor, reciprocal: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of x and of the weight."""
    normed, wide = x * reciprocal, grad.to(reciprocal.dtype)
    scaled = wide * weight
    grad_x = reciprocal * (scaled - normed * (scaled * normed).mean(-1, keepdim=True))
    return grad_x.to(x.dtype), (wide * normed).flatten(0, -2).sum(0).to(weight.dtype)


@compute_gradients.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor, reciprocal: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weight)


def save_for_backward(ctx: FunctionCtx, inputs: tuple[Tensor, Tensor, float], output: tuple[Tensor, Tensor]) -> None:
    """Save the input, the weight, and the number per row."""
    ctx.save_for_backward(*inputs[:2], output[1])


def run_backward(ctx: FunctionCtx, grad: Tensor, _: Tensor | None) -> tuple[Tensor, Tensor, None]:
    """The gradients of the arguments of `normalize`."""
    return *compute_gradients(grad, *ctx.saved_tensors), None  # type: ignore[attr-defined]


normalize.register_autograd(run_backward, setup_context=save_for_backward)


def rms_norm(
    x: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    """As `torch.nn.functional.rms_norm`, with the fused operation for the arguments that CUDA has it for."""
    if weight is None or weight.dtype != x.dtype or len(normalized_shape) > 1:
        return rms_norm_on_cpu(x, list(normalized_shape), weight, eps)
    return normalize(x, weight, torch.finfo(x.dtype).eps if eps is None else eps)[0]
