"""Causal attention on a CPU while training: the operation `litgpt::causal_attention`, with a backward pass in float32.

torch's flash kernel computes 64 queries of a head at a time in texts of 192 to 767 tokens, in products so small that
those of all heads together are faster, see `causal_products`. Its own backward pass in bfloat16 takes up to four times
as long where rows or heads are short, and is never faster; its gradients are also two to three times as far from the
exact ones. `torch.compile` does not look into the operation, and its graphs are the same for all numbers of tokens.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from litgpt.model.causal_products import allocate_like, attend_by_products, differentiate_products
from litgpt.model.uncompiled import called_while_compiling

HALF_TYPES = (torch.bfloat16, torch.float16)
BY_PRODUCTS = range(384, 768)
"""Tokens of texts for which products are used: for most shapes faster than the kernel."""

operations = torch.library.Library("litgpt", "FRAGMENT")
operations.define("causal_attention(Tensor query, Tensor key, Tensor value, float scale) -> (Tensor, Tensor)")
operations.define(
    "causal_attention_backward(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor output, Tensor logsumexp,"
    " float scale) -> (Tensor, Tensor, Tensor)"
)


@called_while_compiling
def is_flash_allowed() -> bool:
    """Whether the settings of torch allow flash kernels, which its compiler cannot read."""
    return torch.backends.cuda.flash_sdp_enabled()


def is_flash_on_cpu(q_BHTS: Tensor, k_BKTS: Tensor, v_BKTS: Tensor) -> bool:
    """Whether these are queries, keys and values on a CPU that require a gradient, for a flash kernel in their type."""
    tensors = (q_BHTS, k_BKTS, v_BKTS)
    return (
        torch.is_grad_enabled()
        and is_flash_allowed()
        and any(x.requires_grad for x in tensors)
        and all(x.device.type == "cpu" and x.stride(-1) == 1 for x in tensors)
        and q_BHTS.dtype == k_BKTS.dtype == v_BKTS.dtype
        and q_BHTS.shape[2:] == k_BKTS.shape[2:] == v_BKTS.shape[2:]
        and (q_BHTS.dtype in HALF_TYPES or not torch.is_autocast_enabled("cpu"))
    )


def is_faster_on_cpu(q_BHTS: Tensor, k_BKTS: Tensor, v_BKTS: Tensor) -> bool:
    """Whether the operation is used instead of torch's: where it is faster, and in compiled code for all tokens."""
    is_other = torch.compiler.is_compiling() or q_BHTS.dtype in HALF_TYPES or is_by_products(q_BHTS)
    return is_other and is_flash_on_cpu(q_BHTS, k_BKTS, v_BKTS)


def is_by_products(q_BHTS: Tensor) -> bool:
    """Whether attention is by products: by its tokens and dtype, unless only torch's flash kernel is allowed."""
    dtypes = (torch.float32, *HALF_TYPES)
    return q_BHTS.dtype in dtypes and q_BHTS.shape[2] in BY_PRODUCTS and torch.backends.cuda.math_sdp_enabled()


def attend_causally(q_BHTS: Tensor, k_BKTS: Tensor, v_BKTS: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attention, (B, H, T, S), and the logarithm of each query's sum of exponential scores, (B, H, T)."""
    if not is_by_products(q_BHTS):
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        output, logsumexp = kernel(q_BHTS, k_BKTS, v_BKTS, 0.0, True, scale=scale)
        return join_heads(output), join_heads(logsumexp)
    with torch.autocast("cpu", enabled=False):
        return attend_by_products(q_BHTS, k_BKTS, v_BKTS, scale)


def differentiate_causally(
    grad_BHTS: Tensor, q_BHTS: Tensor, k_BKTS: Tensor, v_BKTS: Tensor, output: Tensor, logsumexp: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of the queries, keys and values of `attend_causally`, in their type."""
    if is_by_products(q_BHTS):
        with torch.autocast("cpu", enabled=False):
            return differentiate_products(grad_BHTS, q_BHTS, k_BKTS, v_BKTS, output, logsumexp, scale)
    operands = [grad_BHTS, q_BHTS, k_BKTS, v_BKTS, output]
    if q_BHTS.dtype in HALF_TYPES:
        operands = [x.float() for x in operands]
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    gradients = kernel(*operands, logsumexp, 0.0, True, scale=scale)
    of_q, of_k, of_v = (join_heads(x.to(q_BHTS.dtype)) for x in gradients)
    return of_q, of_k, of_v


def join_heads(x_BHT: Tensor) -> Tensor:
    """The same values, (B, H, T, ...), with all heads of a token next to each other, as graphs are compiled for."""
    return x_BHT.transpose(1, 2).contiguous().transpose(1, 2)


def allocate_causal_outputs(q_BHTS: Tensor, _k: Tensor, _v: Tensor, _scale: float) -> tuple[Tensor, Tensor]:
    """Tensors for what `attend_causally` returns."""
    wide = torch.promote_types(q_BHTS.dtype, torch.float32)
    return allocate_like(q_BHTS), allocate_like(q_BHTS[..., 0], wide)


def allocate_qkv_gradients(
    _grad: Tensor, q_BHTS: Tensor, k_BKTS: Tensor, v_BKTS: Tensor, _output: Tensor, _logsumexp: Tensor, _scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Tensors for what `differentiate_causally` returns."""
    return allocate_like(q_BHTS), allocate_like(k_BKTS), allocate_like(v_BKTS)


def save_causal_attention(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """Save queries, keys, values, their output, and the number per query."""
    ctx.save_for_backward(*inputs[:3], *output)
    ctx.scale = inputs[3]


def run_causal_backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    """The gradients of the arguments of `attend_causally`."""
    return *torch.ops.litgpt.causal_attention_backward(grad, *ctx.saved_tensors, ctx.scale), None


def refuse_second_derivative(_ctx: Any, *_grads: Tensor) -> None:
    """Raise an error that names the kernel that has second derivatives."""
    raise NotImplementedError("attention: auto has no second derivatives on a CPU; use attention: math")


operations.impl("causal_attention", attend_causally, "CPU")
operations.impl("causal_attention_backward", differentiate_causally, "CPU")
torch.library.register_fake("litgpt::causal_attention", allocate_causal_outputs, lib=operations)
torch.library.register_fake("litgpt::causal_attention_backward", allocate_qkv_gradients, lib=operations)
torch.library.register_autograd(
    "litgpt::causal_attention", run_causal_backward, setup_context=save_causal_attention, lib=operations
)
torch.library.register_autograd("litgpt::causal_attention_backward", refuse_second_derivative, lib=operations)


class FlashAttention(torch.autograd.Function):
    """Causal attention, (B, H, T, S), to one document after the other; head h uses keys h K / H.

    The outputs of documents are kept for the backward pass in one tensor, which is also what the next layer keeps.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, sizes: Sequence[int]) -> Tensor:
        """Attend.

        Args:
            sizes: tokens of each document, T in all.
        """
        documents = zip(*(x.split(sizes, dim=2) for x in (q, k, v)), strict=True)
        results = [torch.ops.litgpt.causal_attention(*document, scale) for document in documents]
        outputs, logsumexps = zip(*results, strict=True)
        output = join_documents(outputs)
        ctx.save_for_backward(q, k, v, output, *logsumexps)
        ctx.scale, ctx.sizes = scale, sizes
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, output, *logsumexps = ctx.saved_tensors
        documents = zip(*(x.split(ctx.sizes, dim=2) for x in (grad, q, k, v, output)), strict=True)
        parts = [
            torch.ops.litgpt.causal_attention_backward(*document, logsumexp, ctx.scale)
            for document, logsumexp in zip(documents, logsumexps, strict=True)
        ]
        return *(join_documents(of_documents) for of_documents in zip(*parts, strict=True)), None, None


def join_documents(parts_BHTS: Sequence[Tensor]) -> Tensor:
    """The tokens of documents in one tensor, (B, H, T, S), with all heads of a token next to each other in memory."""
    if len(parts_BHTS) == 1:
        return parts_BHTS[0]
    return torch.cat([x_BHTS.transpose(1, 2) for x_BHTS in parts_BHTS], dim=1).transpose(1, 2)
