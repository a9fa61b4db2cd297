"""The RMS norm that accelerators compute in one kernel, for tensors on the CPU.

On the CPU, `torch.nn.functional.rms_norm` is a chain of operations in float32 whose results are saved for the backward
pass. On CUDA it is one operation, which saves its input and a number per row.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx

rms_norm_on_cpu = F.rms_norm
ROWS_AT_A_TIME = 16  # that are computed at a time


@torch.library.custom_op("litgpt::fused_rms_norm", mutates_args=())
def normalize(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The norm over the last dim (Zhang and Sennrich 2019, eq. 4), and the reciprocal of the root mean square.

    Args:
        x: (..., D).
        weight: (D,).

    Returns:
        (..., D) in the type of x, and (..., 1), in float32 or wider.
    """
    y, reciprocal = allocate_output(x, weight, eps)
    for x_ND, y_ND, reciprocal_N1 in iterate_rows(x, y, reciprocal):
        wide_ND = x_ND.to(reciprocal.dtype)
        reciprocal_N1.copy_((wide_ND.square().mean(-1, keepdim=True) + eps).rsqrt())
        y_ND.copy_(wide_ND * reciprocal_N1 * weight)
    return y, reciprocal


@normalize.register_fake
def allocate_output(x: Tensor, _weight: Tensor, _eps: float) -> tuple[Tensor, Tensor]:
    """Tensors for what `normalize` returns."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return torch.empty_like(x), x.new_empty((*x.shape[:-1], 1), dtype=wide)


@torch.library.custom_op("litgpt::fused_rms_norm_backward", mutates_args=())
def compute_norm_gradients(grad: Tensor, x: Tensor, weight: Tensor, reciprocal: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of x and of the weight."""
    grad_x, grad_weight = torch.empty_like(x), torch.zeros_like(weight, dtype=reciprocal.dtype)
    for grad_ND, x_ND, reciprocal_N1, grad_x_ND in iterate_rows(grad, x, reciprocal, grad_x):
        normed_ND, wide_ND = x_ND * reciprocal_N1, grad_ND.to(reciprocal.dtype)
        scaled_ND = wide_ND * weight
        grad_x_ND.copy_(reciprocal_N1 * (scaled_ND - normed_ND * (scaled_ND * normed_ND).mean(-1, keepdim=True)))
        grad_weight += (wide_ND * normed_ND).sum(0)
    return grad_x, grad_weight.to(weight.dtype)


@compute_norm_gradients.register_fake
def allocate_gradients(_grad: Tensor, x: Tensor, weight: Tensor, _reciprocal: Tensor) -> tuple[Tensor, Tensor]:
    """Tensors for what `compute_norm_gradients` returns."""
    return torch.empty_like(x), torch.empty_like(weight)


def iterate_rows(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """A few rows of tensors at a time, so that what is computed of them takes little memory, as in a kernel."""
    return zip(*(tensor.view(-1, tensor.shape[-1]).split(ROWS_AT_A_TIME) for tensor in tensors), strict=True)


def save_for_backward(ctx: FunctionCtx, inputs: tuple[Tensor, Tensor, float], output: tuple[Tensor, Tensor]) -> None:
    """Save the input, the weight, and the number per row."""
    ctx.save_for_backward(*inputs[:2], output[1])


def run_backward(ctx: FunctionCtx, grad: Tensor, _: Tensor | None) -> tuple[Tensor, Tensor, None]:
    """The gradients of the arguments of `normalize`."""
    return *compute_norm_gradients(grad, *ctx.saved_tensors), None  # type: ignore[attr-defined]


normalize.register_autograd(run_backward, setup_context=save_for_backward)


def rms_norm(
    x: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    """As `torch.nn.functional.rms_norm`, with the fused operation for the arguments that CUDA has it for."""
    if weight is None or weight.dtype != x.dtype or len(normalized_shape) > 1:
        return rms_norm_on_cpu(x, list(normalized_shape), weight, eps)
    return normalize(x, weight, torch.finfo(x.dtype).eps if eps is None else eps)[0]
