"""Causal attention of 16-bit numbers on a CPU whose backward pass computes in float32.

torch's own backward pass in bfloat16 takes up to four times as long where rows or heads are short, and is never faster;
its gradients are also two to three times as far from the exact ones.
"""

from typing import Any

import torch
from torch import Tensor

NARROW = (torch.bfloat16, torch.float16)


def is_narrow(q_BHTS: Tensor, k_BKUS: Tensor, v_BKUS: Tensor) -> bool:
    """Whether these are 16-bit queries, keys and values on a CPU that a gradient is wanted of."""
    inputs = (q_BHTS, k_BKUS, v_BKUS)
    return (
        torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and any(one.requires_grad for one in inputs)
        and all(one.device.type == "cpu" and one.dtype in NARROW and one.stride(-1) == 1 for one in inputs)
        and len({(one.dtype, *one.shape[2:]) for one in inputs}) == 1
    )


def narrow_attention(q_BHTS: Tensor, k_BKUS: Tensor, v_BKUS: Tensor, scale: float) -> Tensor:
    """What each query finds among the keys up to its own, (B, H, T, S); query head h reads key-value head h K / H."""
    return _Narrow.apply(q_BHTS, k_BKUS, v_BKUS, scale)


class _Narrow(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        found, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True, scale=scale)
        ctx.save_for_backward(q, k, v, found, sums)
        ctx.scale = scale
        return found

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        *narrow, sums = ctx.saved_tensors
        wide = [one.float() for one in (slope, *narrow)]
        slopes = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *wide, sums, 0.0, True, scale=ctx.scale
        )
        return (*(one.to(slope.dtype) for one in slopes), None)
