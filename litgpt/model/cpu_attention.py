"""Causal flash attention on a CPU, in 16 bits with a backward pass in float32.

torch's own backward pass in bfloat16 takes up to four times as long where rows or heads are short, and is never faster;
its gradients are also two to three times as far from the exact ones.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

HALF_TYPES = (torch.bfloat16, torch.float16)


def is_flash_on_cpu(q_BHTS: Tensor, k_BKUS: Tensor, v_BKUS: Tensor) -> bool:
    """Whether these are queries, keys and values on a CPU that require a gradient, for a flash kernel in their type."""
    tensors = (q_BHTS, k_BKUS, v_BKUS)
    return (
        torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and torch.backends.cuda.flash_sdp_enabled()
        and any(x.requires_grad for x in tensors)
        and all(x.device.type == "cpu" and x.stride(-1) == 1 for x in tensors)
        and len({(x.dtype, *x.shape[2:]) for x in tensors}) == 1
        and (q_BHTS.dtype in HALF_TYPES or not torch.is_autocast_enabled("cpu"))
    )


def is_half_on_cpu(q_BHTS: Tensor, k_BKUS: Tensor, v_BKUS: Tensor) -> bool:
    """Whether these are 16-bit queries, keys and values on a CPU that require a gradient, for a flash kernel."""
    return q_BHTS.dtype in HALF_TYPES and is_flash_on_cpu(q_BHTS, k_BKUS, v_BKUS)


class FlashAttention(torch.autograd.Function):
    """Causal flash attention, (B, H, T, S), to one document after the other; head h uses keys h K / H.

    The outputs of documents are kept for the backward pass in one tensor, which is also what the next layer keeps.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, sizes: Sequence[int], upcast: bool) -> Tensor:
        """Attend.

        Args:
            sizes: tokens of each document, T in all.
            upcast: whether the backward pass is in float32.
        """
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        documents = zip(*(x.split(sizes, dim=2) for x in (q, k, v)), strict=True)
        outputs, logsumexps = zip(*(kernel(*document, 0.0, True, scale=scale) for document in documents), strict=True)
        output = join_documents(outputs)
        ctx.save_for_backward(q, k, v, output, *logsumexps)
        ctx.scale, ctx.sizes, ctx.upcast = scale, sizes, upcast
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        q, k, v, output, *logsumexps = ctx.saved_tensors
        documents = zip(*(x.split(ctx.sizes, dim=2) for x in (grad, q, k, v, output)), strict=True)
        parts = []
        for document, logsumexp in zip(documents, logsumexps, strict=True):
            operands = [x.float() for x in document] if ctx.upcast else document
            grads = kernel(*operands, logsumexp, 0.0, True, scale=ctx.scale)
            parts.append([x.to(grad.dtype) for x in grads])
        return (*(join_documents(of_documents) for of_documents in zip(*parts, strict=True)), None, None, None)


def join_documents(parts_BHTS: Sequence[Tensor]) -> Tensor:
    """The tokens of documents in one tensor, (B, H, T, S), with all heads of a token next to each other in memory."""
    if len(parts_BHTS) == 1:
        return parts_BHTS[0]
    return torch.cat([x_BHTS.transpose(1, 2) for x_BHTS in parts_BHTS], dim=1).transpose(1, 2)
