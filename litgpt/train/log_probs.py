"""Log-probabilities of labels with gradients, without materializing the logits of all tokens at once.

Axes: N tokens, n of them with a label, D model width, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from litgpt.data.stream.batch import IGNORE
from litgpt.model.gpt import compute_logits
from litgpt.parallel.token_sharding import VocabularyShard
from litgpt.train.cross_entropy import (
    GradientSums,
    LogitChunk,
    apply_in_autocast_dtype,
    get_exact_dtype,
    iterate_chunks,
)


@dataclass(frozen=True)
class TokenLabels:
    """The labels of a batch, and what is recorded of their tokens without gradients.

    Attributes:
        labels_BT: token ids, or `IGNORE`.
        log_squares_N: zeros, set to log sum_v p_v^2, the log-probability that two draws from the model's distribution
            at a token are equal; None if that is not needed.
        mean_logits_N: zeros, set to the mean of the logits over the vocabulary; None if that is not needed.
    """

    labels_BT: Tensor
    log_squares_N: Tensor | None = None
    mean_logits_N: Tensor | None = None


def plain_log_probs(
    hidden_BTD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    softcap: float | None = None,
    *,
    target: TokenLabels,
    vocabulary: VocabularyShard | None = None,
) -> Tensor:
    """The log-probability (N,) of each label in nats, 0 where it is ignored, from all (B, T, V) logits.

    Args:
        vocabulary: the shard of rows that weight and bias are; None if they are all rows.
    """
    logits = compute_logits(hidden_BTD, weight_VD, bias_V, softcap)
    logits = logits if vocabulary is None else vocabulary.gather_logits(logits)
    upcast_NV = logits.flatten(0, 1).to(get_exact_dtype(logits))
    labels_N = target.labels_BT.flatten()
    ignored_N = labels_N == IGNORE
    log_probs_NV = upcast_NV.log_softmax(-1)
    if target.log_squares_N is not None:
        target.log_squares_N.copy_((2 * log_probs_NV.detach()).logsumexp(-1).masked_fill(ignored_N, 0))
    if target.mean_logits_N is not None:
        target.mean_logits_N.copy_(upcast_NV.detach().mean(-1).masked_fill(ignored_N, 0))
    return log_probs_NV.gather(1, labels_N.clamp(min=0)[:, None])[:, 0].masked_fill(ignored_N, 0)


def chunked_log_probs(
    hidden_BTD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    softcap: float | None = None,
    *,
    target: TokenLabels,
    chunk_rows: int,
    vocabulary: VocabularyShard | None = None,
) -> Tensor:
    """`plain_log_probs`, computed for `chunk_rows` tokens at a time; ignored tokens are skipped.

    If the head is frozen, the gradient of each log-probability with respect to its hidden state is computed with it,
    and backward multiplies it by the upstream gradient. If the head is trained, backward computes the logits again.

    Args:
        hidden_BTD: input of the head.
        softcap: logits become softcap tanh(logit / softcap).
        vocabulary: the shard of rows that weight and bias are; None if they are all rows. The gradient of the hidden
            states is then this rank's term of a sum over shards.
    """
    return apply_in_autocast_dtype(
        ChunkedLogProbs, hidden_BTD, weight_VD, bias_V, target, chunk_rows, softcap, vocabulary
    )


class ChunkedLogProbs(torch.autograd.Function):
    """Log-probabilities of labels (N,)."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        target: TokenLabels,
        chunk_rows: int,
        softcap: float | None,
        vocabulary: VocabularyShard | None,
    ) -> Tensor:
        labels_N = target.labels_BT.flatten()
        indices = labels_N.ne(IGNORE).nonzero().squeeze(1)
        labels, inputs = labels_N[indices], hidden_ND[indices]
        exact = get_exact_dtype(hidden_ND)
        log_probs = torch.zeros(len(labels_N), dtype=exact, device=hidden_ND.device)
        logit_sums = None if target.mean_logits_N is None else log_probs.new_zeros(len(labels))
        ctx.trains_head = any(ctx.needs_input_grad[1:3])
        gradients = None
        if ctx.needs_input_grad[0] and not ctx.trains_head:
            gradients = GradientSums(inputs, weight_VD, bias_V, exact, head=False)
        ctx.arguments = (chunk_rows, softcap, vocabulary)
        chunks = iterate_chunks(inputs, weight_VD, bias_V, labels, chunk_rows, softcap, vocabulary, logit_sums)
        for part, chunk in chunks:
            log_probs[indices[part]] = -chunk.losses[:, 0]
            if target.log_squares_N is not None:
                log_squares = compute_log_squares(chunk, vocabulary)
                target.log_squares_N[indices[part]] = log_squares.to(target.log_squares_N.dtype)
            if gradients is not None:
                gradients.add(part, chunk, None)
        if target.mean_logits_N is not None and logit_sums is not None:
            mean_logits = compute_mean_logits(logit_sums, len(weight_VD), vocabulary)
            target.mean_logits_N[indices] = mean_logits.to(target.mean_logits_N.dtype)
        if ctx.trains_head:
            ctx.save_for_backward(indices, hidden_ND, weight_VD, bias_V, labels)
        elif gradients is not None:
            ctx.save_for_backward(indices, gradients.hidden)
        return log_probs

    @staticmethod
    def backward(ctx: Any, upstream_N: Tensor) -> tuple[Tensor | None, ...]:
        indices, *saved = ctx.saved_tensors
        factors = -upstream_N[indices, None]  # the chunks have losses and their gradients
        if not ctx.trains_head:
            hidden = saved[0] * factors.to(saved[0].dtype)
            return scatter_rows(hidden, indices, len(upstream_N)), None, None, None, None, None, None
        hidden_ND, weight_VD, bias_V, labels = saved
        inputs = hidden_ND[indices]
        gradients = GradientSums(inputs, weight_VD, bias_V, factors.dtype, head=True)
        for part, chunk in iterate_chunks(inputs, weight_VD, bias_V, labels, *ctx.arguments):
            gradients.add(part, chunk, factors[part])
        bias = None if bias_V is None else gradients.bias.to(bias_V.dtype)
        hidden = scatter_rows(gradients.hidden, indices, len(hidden_ND))
        return hidden, gradients.weight.to(weight_VD.dtype), bias, None, None, None, None


def scatter_rows(rows: Tensor, indices: Tensor, size: int) -> Tensor:
    """(size, D), the rows (n, D) at their indices and zeros elsewhere."""
    return rows.new_zeros(size, rows.shape[1]).index_copy_(0, indices, rows)


def compute_log_squares(chunk: LogitChunk, vocabulary: VocabularyShard | None) -> Tensor:
    """log sum_v p_v^2 (n,) of the distributions of a chunk."""
    norms = torch.linalg.vector_norm(chunk.exponentials, dim=-1, dtype=chunk.total.dtype)
    squares = (norms / chunk.total[:, 0]).square()
    return (squares if vocabulary is None else vocabulary.all_reduce_sum(squares)).log()


def compute_mean_logits(logit_sums: Tensor, rows: int, vocabulary: VocabularyShard | None) -> Tensor:
    """The mean logit (n,) from the sums of the local logits of as many rows on each rank."""
    if vocabulary is None:
        return logit_sums / rows
    return vocabulary.all_reduce_sum(logit_sums) / vocabulary.all_reduce_sum(torch.full_like(logit_sums[:1], rows))
