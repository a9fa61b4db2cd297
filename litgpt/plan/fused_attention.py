"""The attention that accelerators compute in one kernel, for tensors on the CPU whose values have another size.

torch's flash kernel of the CPU needs values as long as keys. Others, such as those of latent attention, are computed
there by the whole matrix of scores. CUDA's memory-efficient kernel keeps a number per query instead of its scores.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx

attention_on_cpu = F.scaled_dot_product_attention
QUERIES_AT_A_TIME = 16  # whose scores are computed at a time


@torch.library.custom_op("litgpt::fused_attention", mutates_args=())
def compute_attention(
    query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Softmax attention without a mask.

    Args:
        query: (B, H, T, S).
        key: (B, H, U, S).
        value: (B, H, U, V).
        is_causal: whether query t attends to the first t + 1 keys only.

    Returns:
        (B, H, T, V) in the type of the queries, and the logarithm of the sum of exponential scores, (B, H, T), in
        float32 or wider.
    """
    output, logsumexp = allocate_attention(query, key, value, is_causal, scale)
    for span, scores in iterate_scores(query, key, is_causal, scale):
        logsumexp[..., span] = scores.logsumexp(-1)
        output[..., span, :] = (scores.softmax(-1) @ value.to(scores.dtype)).to(output.dtype)
    return output, logsumexp


@compute_attention.register_fake
def allocate_attention(
    query: Tensor, _key: Tensor, value: Tensor, _is_causal: bool, _scale: float
) -> tuple[Tensor, Tensor]:
    """Tensors for what `compute_attention` returns, with all heads of a token next to each other in memory."""
    batch, heads, tokens, _ = query.shape
    output = query.new_empty(batch, tokens, heads, value.shape[-1]).transpose(1, 2)
    return output, query.new_empty(query.shape[:-1], dtype=torch.promote_types(query.dtype, torch.float32))


@torch.library.custom_op("litgpt::fused_attention_backward", mutates_args=())
def compute_attention_gradients(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    logsumexp: Tensor,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of queries, keys and values (Dao et al. 2022, "FlashAttention", algorithm 4)."""
    wide_k, wide_v = (x.to(logsumexp.dtype) for x in (key, value))
    grad_q = torch.empty_like(query)
    grad_k, grad_v = torch.zeros_like(wide_k), torch.zeros_like(wide_v)
    for span, scores in iterate_scores(query, key, is_causal, scale):
        weights = (scores - logsumexp[..., span, None]).exp()
        wide_grad = grad[..., span, :].to(scores.dtype)
        grad_v += weights.mT @ wide_grad
        rest = (wide_grad * output[..., span, :]).sum(-1, keepdim=True)
        grad_scores = weights * (wide_grad @ wide_v.mT - rest) * scale
        grad_q[..., span, :] = (grad_scores @ wide_k).to(query.dtype)
        grad_k += grad_scores.mT @ query[..., span, :].to(scores.dtype)
    return grad_q, grad_k.to(key.dtype), grad_v.to(value.dtype)


@compute_attention_gradients.register_fake
def allocate_attention_gradients(
    _grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    _output: Tensor,
    _logsumexp: Tensor,
    _is_causal: bool,
    _scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Tensors for what `compute_attention_gradients` returns."""
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def iterate_scores(query: Tensor, key: Tensor, is_causal: bool, scale: float) -> Iterator[tuple[slice, Tensor]]:
    """The scores of a few queries at a time, (B, H, t, U) in float32 or wider, with the span of the queries."""
    wide = torch.promote_types(query.dtype, torch.float32)
    tokens, keys = query.shape[2], key.shape[2]
    for start in range(0, tokens, QUERIES_AT_A_TIME):
        span = slice(start, min(tokens, start + QUERIES_AT_A_TIME))
        scores = query[..., span, :].to(wide) @ key.to(wide).mT * scale
        if is_causal:
            allowed = torch.ones(tokens, keys, dtype=torch.bool, device=query.device).tril()[span]
            scores = scores.masked_fill(~allowed, float("-inf"))
        yield span, scores


def save_attention(ctx: FunctionCtx, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """Save queries, keys, values, their output, and the number per query."""
    ctx.save_for_backward(*inputs[:3], *output)
    ctx.settings = inputs[3:]  # type: ignore[attr-defined]


def run_attention_backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    """The gradients of the arguments of `compute_attention`."""
    return *compute_attention_gradients(grad, *ctx.saved_tensors, *ctx.settings), None, None


compute_attention.register_autograd(run_attention_backward, setup_context=save_attention)


def attend_fused(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """As `torch.nn.functional.scaled_dot_product_attention`, with the fused operation for values of another size."""
    if query.shape[-1] == value.shape[-1] or attn_mask is not None or dropout_p or enable_gqa:
        settings: dict[str, Any] = {"is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa}
        return attention_on_cpu(query, key, value, attn_mask, dropout_p, **settings)
    if torch.is_autocast_enabled("cpu"):
        query, key, value = (x.to(torch.get_autocast_dtype("cpu")) for x in (query, key, value))
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    return compute_attention(query, key, value, is_causal, factor)[0]
