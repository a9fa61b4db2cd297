"""Causal attention by matrix products in float32 of a block of queries at a time and the keys up to them, on a CPU.

torch's flash kernel computes one head after the other. Here a product is one of all heads of some rows, and the queries
of a group are rows of the same matrix, so that its keys are read once. As there, only the scores of a block exist at a
time, and the backward pass computes them again from the logarithm of their sum (Dao et al. 2022).

Axes: B rows, H heads, K key-value heads, G heads of a group, T tokens, S numbers of a head.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK_QUERIES = 64
"""Queries of each head in a block: with fewer, products are smaller; with more, more scores are of later keys."""
BLOCK_SCORES = 1 << 20
"""Scores of a block, 4 MiB, which the last cache of a CPU holds; more only if one row has more."""
LOG2E = math.log2(math.e)  # scores are computed for exp2, which is faster than exp


def attend_by_products(q_BHTS: Tensor, k_BKTS: Tensor, v_BKTS: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attention, (B, H, T, S), and the logarithm of each query's sum of exponential scores, (B, H, T), in float32."""
    output, groups = allocate_like(q_BHTS), k_BKTS.shape[1]
    logsumexp = allocate_like(q_BHTS[..., 0], torch.float32)
    for rows in iterate_row_spans(q_BHTS):
        q, k, v = (widen(x[rows], groups) for x in (q_BHTS, k_BKTS, v_BKTS))
        q *= scale * LOG2E
        outputs, sums = (split_groups(x[rows], groups) for x in (output, logsumexp))
        for span, _, scores in iterate_blocks(q, k):
            highest = scores.amax(-1, keepdim=True)
            scores.sub_(highest).exp2_()
            total = scores.sum(-1, keepdim=True)
            copy_in_order(outputs[:, :, span], torch.bmm(scores, v[:, : span.stop]).div_(total))
            copy_in_order(sums[:, :, span], total.log2_().add_(highest).div_(LOG2E))
    return output, logsumexp


def differentiate_products(
    grad_BHTS: Tensor, q_BHTS: Tensor, k_BKTS: Tensor, v_BKTS: Tensor, output: Tensor, logsumexp: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of queries, keys and values.

    Queries and output gradients have one more column, and keys and values a column of ones, so that the same products
    also subtract each query's logsumexp from its scores, and its sum of gradient times output from the gradients of its
    weights.
    """
    of_q, of_k, of_v = (allocate_like(x) for x in (q_BHTS, k_BKTS, v_BKTS))
    groups, size = k_BKTS.shape[1], q_BHTS.shape[3]
    for rows in iterate_row_spans(q_BHTS):
        q, k, v, grad = (widen(x[rows], groups, extra=1) for x in (q_BHTS, k_BKTS, v_BKTS, grad_BHTS))
        q *= scale * LOG2E
        q[..., size:] = widen(logsumexp[rows].unsqueeze(-1), groups).mul_(-LOG2E)
        grad[..., size:] = widen(output[rows], groups).mul_(grad[..., :size]).sum(-1, keepdim=True).neg_()
        k[..., size:] = v[..., size:] = 1
        sum_k, sum_v = (torch.zeros_like(x[..., :size]) for x in (k, v))
        grads_q = split_groups(of_q[rows], groups)
        for span, queries, scores in iterate_blocks(q, k):
            weights = scores.exp2_()
            sum_v[:, : span.stop] += torch.bmm(weights.mT, grad[:, queries, :size])
            of_scores = torch.bmm(grad[:, queries], v[:, : span.stop].mT).mul_(weights)
            copy_in_order(grads_q[:, :, span], torch.bmm(of_scores, k[:, : span.stop, :size]).mul_(scale))
            sum_k[:, : span.stop] += torch.bmm(of_scores.mT, q[:, queries, :size])
        copy_in_order(of_k[rows], sum_k.div_(LOG2E))
        copy_in_order(of_v[rows], sum_v)
    return of_q, of_k, of_v


def iterate_row_spans(q_BHTS: Tensor) -> Iterator[slice]:
    """As many rows at a time as have `BLOCK_SCORES` scores in a block."""
    rows, heads, tokens, _ = q_BHTS.shape
    at_once = max(1, BLOCK_SCORES // (heads * BLOCK_QUERIES * tokens))
    return (slice(start, start + at_once) for start in range(0, rows, at_once))


def iterate_blocks(q: Tensor, k: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
    """The span of the tokens of a block, that of its queries, and their scores, (B K, queries, keys), to be changed."""
    tokens, group = k.shape[1], q.shape[1] // k.shape[1]
    is_later = q.new_full((BLOCK_QUERIES, BLOCK_QUERIES), -math.inf).triu_(1)
    memory = q.new_empty(len(q) * BLOCK_QUERIES * group * tokens)
    for start in range(0, tokens, BLOCK_QUERIES):
        stop = min(start + BLOCK_QUERIES, tokens)
        count, queries = stop - start, slice(start * group, stop * group)
        scores = memory[: len(q) * count * group * stop].view(len(q), count * group, stop)
        torch.bmm(q[:, queries], k[:, :stop].mT, out=scores)
        scores.view(-1, count, group, stop)[..., start:] += is_later[:count, None, :count]
        yield slice(start, stop), queries, scores


def split_groups(x_BHT: Tensor, groups: int) -> Tensor:
    """Heads by their group, (B, K, T, G, ...)."""
    return x_BHT.unflatten(1, (groups, -1)).transpose(2, 3)


def widen(x_BHTS: Tensor, groups: int, *, extra: int = 0) -> Tensor:
    """A copy in float32, (B K, T G, S + extra), with the heads of a group next to each other; the rest is not set."""
    parts = split_groups(x_BHTS, groups)
    size = parts.shape[-1]
    copy = parts.new_empty((*parts.shape[:-1], size + extra), dtype=torch.float32)
    copy[..., :size] = parts
    return copy.flatten(2, 3).flatten(0, 1)


def copy_in_order(target: Tensor, values: Tensor) -> None:
    """Copy as many values in the same order but of other dims."""
    target.copy_(values.view(target.shape))


def allocate_like(x_BHT: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor of the same shape, (B, H, T, ...), with all heads of a token next to each other in memory."""
    return torch.empty_like(x_BHT.transpose(1, 2), dtype=dtype, memory_format=torch.contiguous_format).transpose(1, 2)
