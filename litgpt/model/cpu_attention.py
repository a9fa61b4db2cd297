"""Causal attention in 16 bits on a CPU with a backward pass in float32.

torch's own backward pass in bfloat16 takes up to four times as long where rows or heads are short, and is never faster;
its gradients are also two to three times as far from the exact ones.
"""

from typing import Any

import torch
from torch import Tensor

HALF_TYPES = (torch.bfloat16, torch.float16)


def is_half_on_cpu(q_BHTS: Tensor, k_BKUS: Tensor, v_BKUS: Tensor) -> bool:
    """Whether these are 16-bit queries, keys and values on a CPU that require a gradient, for a flash kernel."""
    tensors = (q_BHTS, k_BKUS, v_BKUS)
    return (
        torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and torch.backends.cuda.flash_sdp_enabled()
        and any(x.requires_grad for x in tensors)
        and all(x.device.type == "cpu" and x.dtype in HALF_TYPES and x.stride(-1) == 1 for x in tensors)
        and len({(x.dtype, *x.shape[2:]) for x in tensors}) == 1
    )


class HalfAttention(torch.autograd.Function):
    """Causal flash attention, (B, H, T, S), in 16 bits forward, in float32 backward; head h uses keys h K / H."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        output, logsumexp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True, scale=scale)
        ctx.save_for_backward(q, k, v, output, logsumexp)
        ctx.scale = scale
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *half, logsumexp = ctx.saved_tensors
        upcast = [x.float() for x in (grad, *half)]
        grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *upcast, logsumexp, 0.0, True, scale=ctx.scale
        )
        return (*(x.to(grad.dtype) for x in grads), None)
