"""Root mean square norm on a CPU, which saves its input and a number per row for the backward pass.

torch's is a chain of operations there, which saves another tensor as large as the input, or two in float32 of an
input in 16 bits. Values and gradients are the same to the bit.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def is_trained_on_cpu(x: Tensor) -> bool:
    """Whether a norm of x is computed on a CPU, operation by operation, and may need gradients."""
    return x.device.type == "cpu" and torch.is_grad_enabled() and not torch.compiler.is_compiling()


def normalize_on_cpu(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The norm over the last dim, computed in float32 or wider, (..., D) in the type of x."""
    return TrainedRMSNorm.apply(x, x, weight, eps)


class TrainedRMSNorm(torch.autograd.Function):
    """The norm of x, which is given twice, so that both terms of its gradient are added to others in torch's order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, _: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.to(torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32))
        reciprocal = wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, reciprocal)
        ctx.eps = eps
        return (wide * reciprocal).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, reciprocal = ctx.saved_tensors
        if torch.is_grad_enabled():
            return differentiate(x, weight, ctx.eps, grad)
        wide, grad = x.to(reciprocal.dtype), grad.to(reciprocal.dtype)
        grad_weight = None
        if ctx.needs_input_grad[2]:
            grad_weight = (wide * reciprocal).mul_(grad).sum_to_size(weight.shape).to(weight.dtype)
        if not ctx.needs_input_grad[0]:
            return None, None, grad_weight, None
        scaled = grad * weight
        of_reciprocal = (scaled * wide).sum(-1, keepdim=True)
        of_mean = of_reciprocal.mul_(-0.5).mul_(reciprocal.pow(3)).div_(x.shape[-1])
        direct, by_mean = scaled.mul_(reciprocal), (2 * wide).mul_(of_mean)
        if x.dtype == reciprocal.dtype:
            return direct, by_mean, grad_weight, None
        return direct.add_(by_mean).to(x.dtype), None, grad_weight, None


def differentiate(x: Tensor, weight: Tensor, eps: float, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients by torch's norm, which have gradients themselves (`create_graph=True`)."""
    dtype = torch.promote_types(x.dtype, weight.dtype)
    y = F.rms_norm(x.to(dtype), weight.shape, weight.to(dtype), eps).to(x.dtype)
    inputs = [tensor for tensor in (x, weight) if tensor.requires_grad]
    gradients = iter(torch.autograd.grad(y, inputs, grad, create_graph=True))
    of_x, of_weight = (next(gradients) if tensor.requires_grad else None for tensor in (x, weight))
    return of_x, None, of_weight, None
