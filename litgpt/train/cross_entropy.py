"""Cross-entropy over the vocabulary, without materializing the logits of all tokens at once.

Axes: N tokens, D model width, V vocabulary.
"""

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from litgpt.data.stream.batch import IGNORE
from litgpt.model.gpt import compute_logits
from litgpt.parallel.token_sharding import VocabularyShard
from litgpt.train.torch_backends import is_faster_by_onednn, onednn_products


@dataclass(frozen=True)
class Labels:
    """The labels of a batch and the weights of their losses.

    Attributes:
        labels_BT: token ids, or `IGNORE`.
        weights_BT: factors of the losses; None for 1.
        dft: multiply each loss by the probability of its label, as a constant, so that unlikely tokens have smaller
            gradients ("dynamic fine-tuning", Wu et al. 2025, eq. 9).
        losses_N: zeros, set to the loss of every label in nats, without factors; None if that is not needed.
    """

    labels_BT: Tensor
    weights_BT: Tensor | None = None
    dft: bool = False
    losses_N: Tensor | None = None


def plain_cross_entropy(
    hidden_BTD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    softcap: float | None = None,
    *,
    target: Labels,
    vocabulary: VocabularyShard | None = None,
) -> Tensor:
    """The summed negative log-likelihood of the labels in nats, from all (B, T, V) logits.

    Args:
        vocabulary: the shard of rows that weight and bias are; None if they are all rows.
    """
    logits = compute_logits(hidden_BTD, weight_VD, bias_V, softcap)
    logits = logits if vocabulary is None else vocabulary.gather_logits(logits)
    upcast = logits if logits.dtype == torch.float64 else logits.float()
    labels_N = target.labels_BT.flatten()
    losses_N = F.cross_entropy(upcast.flatten(0, 1), labels_N, ignore_index=IGNORE, reduction="none")
    if target.losses_N is not None:
        target.losses_N.copy_(losses_N.detach())
    if target.dft:
        losses_N = losses_N * torch.exp(-losses_N.detach())
    return (losses_N if target.weights_BT is None else losses_N * target.weights_BT.flatten()).sum()


def chunked_cross_entropy(
    hidden_BTD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    softcap: float | None = None,
    *,
    target: Labels,
    chunk_rows: int,
    vocabulary: VocabularyShard | None = None,
) -> Tensor:
    """`plain_cross_entropy`, computed for `chunk_rows` tokens at a time.

    The gradients of hidden states and weight are computed with the loss, from the probabilities of a chunk (Hsu et al.
    2024, Liger Kernel, section 3.2), so no logits are stored or recomputed. Ignored tokens are skipped.

    Args:
        hidden_BTD: input of the head.
        softcap: logits become softcap tanh(logit / softcap).
        vocabulary: the shard of rows that weight and bias are; None if they are all rows. The gradient of the hidden
            states is then this rank's term of a sum over shards.
    """
    return apply_in_autocast_dtype(
        ChunkedCrossEntropy, hidden_BTD, weight_VD, bias_V, target, chunk_rows, softcap, vocabulary
    )


def apply_in_autocast_dtype(
    function: type[torch.autograd.Function],
    hidden_BTD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    *arguments: Any,
) -> Tensor:
    """Apply a function of (N, D) hidden states, weight and bias, in the data type of autocast if that is enabled."""
    device = hidden_BTD.device.type
    if torch.is_autocast_enabled(device):
        compute = torch.get_autocast_dtype(device)
        hidden_BTD, weight_VD = hidden_BTD.to(compute), weight_VD.to(compute)
        bias_V = None if bias_V is None else bias_V.to(compute)
    with torch.autocast(device, enabled=False):
        return function.apply(hidden_BTD.flatten(0, 1), weight_VD, bias_V, *arguments)


class ChunkedCrossEntropy(torch.autograd.Function):
    """Sum of losses; its gradients are computed in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        target: Labels,
        chunk_rows: int,
        softcap: float | None,
        vocabulary: VocabularyShard | None,
    ) -> Tensor:
        labels_N = target.labels_BT.flatten()
        indices = labels_N.ne(IGNORE).nonzero().squeeze(1)
        labels, inputs = labels_N[indices], hidden_ND[indices]
        exact = get_exact_dtype(hidden_ND)
        loss = torch.zeros((), dtype=exact, device=hidden_ND.device)
        weights = None if target.weights_BT is None else target.weights_BT.flatten()[indices, None].to(exact)
        needs_grad = ctx.needs_input_grad[:3]
        head = any(needs_grad[1:])
        gradients = GradientSums(inputs, weight_VD, bias_V, exact, head=head) if any(needs_grad) else None
        for part, chunk in iterate_chunks(inputs, weight_VD, bias_V, labels, chunk_rows, softcap, vocabulary):
            if target.losses_N is not None:
                target.losses_N[indices[part]] = chunk.losses[:, 0].to(target.losses_N.dtype)
            factors = compute_factors(chunk.losses, None if weights is None else weights[part], dft=target.dft)
            loss += (chunk.losses if factors is None else chunk.losses * factors).sum()
            if gradients is not None:
                gradients.add(part, chunk, factors)
        if gradients is not None:
            hidden = torch.zeros_like(hidden_ND).index_copy_(0, indices, gradients.hidden)
            weight = gradients.weight.to(weight_VD.dtype) if needs_grad[1] else None
            bias = gradients.bias.to(bias_V.dtype) if bias_V is not None and needs_grad[2] else None
            ctx.save_for_backward(hidden, weight, bias)
            ctx.scaled = False
        return loss

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        # The saved gradients are used by this node only, so they are scaled in place. A backward pass that is split
        # into halves calls this twice with the same scale.
        if not ctx.scaled:
            for saved in ctx.saved_tensors:
                if saved is not None:
                    saved.data.mul_(scale)  # saved tensors are checked for changes in place
            ctx.scaled = True
        return (*ctx.saved_tensors, None, None, None, None)


@dataclass(frozen=True)
class LogitChunk:
    """The losses of n labels, and what their gradients need.

    Attributes:
        losses: (n, 1), in nats.
        exponentials: (n, V) local exponentials, which are probabilities when divided by `total`.
        total: (n, 1).
        cap_grads: (n, V) derivative of the softcap at each logit; None without one.
        is_local: (n, 1), whether the row of each label is local; None if all are.
        rows: (n,), its index, arbitrary if it is not.
        is_whole: whether n is `chunk_rows`; it may be less in the last chunk.
    """

    losses: Tensor
    exponentials: Tensor
    total: Tensor
    cap_grads: Tensor | None
    is_local: Tensor | None
    rows: Tensor
    is_whole: bool


def iterate_chunks(
    inputs_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    labels_N: Tensor,
    chunk_rows: int,
    softcap: float | None,
    vocabulary: VocabularyShard | None,
    logit_sums_N: Tensor | None = None,
) -> Iterator[tuple[slice, LogitChunk]]:
    """Yield the losses of `chunk_rows` labels at a time, and their range; each chunk overwrites the one before.

    Args:
        logit_sums_N: set to the sum of the local logits of each token; None if that is not needed.
    """
    exact = get_exact_dtype(inputs_ND)
    buffer = inputs_ND.new_empty(min(chunk_rows, len(labels_N)), len(weight_VD))
    for start in range(0, len(labels_N), chunk_rows):
        part = slice(start, min(start + chunk_rows, len(labels_N)))
        is_whole = part.stop - start == chunk_rows
        with select_products(inputs_ND[part], weight_VD, is_whole=is_whole):
            logits = torch.mm(inputs_ND[part], weight_VD.T, out=buffer[: part.stop - start])
        if bias_V is not None:
            logits += bias_V
        cap_grads = None if softcap is None else apply_softcap(logits, softcap)
        if logit_sums_N is not None:
            torch.sum(logits, -1, dtype=exact, out=logit_sums_N[part])
        is_local, rows = find_local_rows(labels_N[part], len(weight_VD), vocabulary)
        label_logits = logits.gather(1, rows[:, None])
        maxima, total = exponentiate(logits, exact)
        if vocabulary is None or is_local is None:
            losses = maxima + total.log() - label_logits
        else:
            losses, total = reduce_losses(vocabulary, label_logits * is_local, maxima, total)
        yield part, LogitChunk(losses, logits, total, cap_grads, is_local, rows, is_whole)


def select_products(rows: Tensor, weight_VD: Tensor, *, is_whole: bool) -> AbstractContextManager[None]:
    """The fastest products of rows of a chunk with the weight, in the block.

    All chunks but the last have one shape, however long the rows of a batch are, so that oneDNN keeps memory for few.
    """
    return onednn_products() if is_whole and is_faster_by_onednn(rows, weight_VD) else nullcontext()


def get_exact_dtype(inputs: Tensor) -> torch.dtype:
    """The type of sums and losses."""
    return torch.float64 if inputs.dtype == torch.float64 else torch.float32


class GradientSums:
    """Gradients of the loss, summed over chunks: probabilities minus one at the label, times the other factor."""

    def __init__(
        self, inputs_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, exact: torch.dtype, *, head: bool
    ) -> None:
        self.inputs, self.weight_VD, self.head = inputs_ND, weight_VD, head
        self.hidden = torch.empty_like(inputs_ND)
        self.weight = torch.zeros(weight_VD.shape if head else (0,), dtype=exact, device=weight_VD.device)
        self.bias = torch.zeros(len(weight_VD) if bias_V is not None else 0, dtype=exact, device=weight_VD.device)

    def add(self, part: slice, chunk: LogitChunk, factors: Tensor | None) -> None:
        """Add the gradients of the losses of a chunk, times factors (n, 1); its exponentials are overwritten."""
        exponentials = multiply_(chunk.exponentials, chunk.cap_grads, factors)
        with select_products(exponentials, self.weight_VD, is_whole=chunk.is_whole):
            self.add_probabilities(part, exponentials, chunk.total)
        self.subtract_labels(part, chunk.rows, chunk.cap_grads, mask_factors(factors, chunk.is_local))

    def add_probabilities(self, chunk: slice, exponentials: Tensor, total: Tensor) -> None:
        """Add the probabilities of a chunk; the total (n, 1) divides the smaller factor of each product."""
        self.hidden[chunk] = (exponentials @ self.weight_VD) / total
        if not self.head:
            return
        scaled = (self.inputs[chunk] / total).to(exponentials.dtype)
        if self.weight.dtype == exponentials.dtype:
            self.weight.addmm_(exponentials.T, scaled)
        else:
            for rows in list_row_blocks(self.weight):
                self.weight[rows] += exponentials[:, rows].T @ scaled
        if len(self.bias):
            self.bias += (exponentials / total).sum(0)

    def subtract_labels(self, chunk: slice, labels: Tensor, cap_grads: Tensor | None, factors: Tensor | None) -> None:
        """Subtract the labels of a chunk, times the gradient of the softcap and the factor of the loss."""
        cap_grad = None if cap_grads is None else cap_grads.gather(1, labels[:, None])
        ones = torch.ones_like(labels, dtype=self.bias.dtype)[:, None]
        self.hidden[chunk] -= multiply_(self.weight_VD[labels], cap_grad, factors)
        if not self.head:
            return
        inputs = multiply_(self.inputs[chunk].clone(), cap_grad, factors)
        self.weight.index_add_(0, labels, inputs.to(self.weight.dtype), alpha=-1)
        if len(self.bias):
            self.bias.index_add_(0, labels, multiply_(ones, cap_grad, factors)[:, 0], alpha=-1)


def list_row_blocks(matrix_VD: Tensor) -> list[slice]:
    """Rows whose sum with others stays in a core's cache; all rows on accelerators.

    On a CPU, a sum of two types is computed from a copy of one of them, so that blocks need less memory, too.
    """
    rows, columns = matrix_VD.shape
    size = max(1, CACHED_ELEMENTS // columns) if matrix_VD.device.type == "cpu" else rows
    return [slice(start, start + size) for start in range(0, rows, size)]


def multiply_(values: Tensor, *factors: Tensor | None) -> Tensor:
    """Multiply `values` in place by the factors that are not None."""
    for factor in factors:
        if factor is not None:
            values.mul_(factor.to(values.dtype))
    return values


def find_local_rows(labels: Tensor, rows: int, vocabulary: VocabularyShard | None) -> tuple[Tensor | None, Tensor]:
    """Whether the row of each label is local (n, 1), None if all are, and its index (n,), arbitrary if it is not."""
    if vocabulary is None:
        return None, labels
    numbers = labels - vocabulary.first_row
    return ((numbers >= 0) & (numbers < rows))[:, None], numbers.clamp(0, rows - 1)


def reduce_losses(
    vocabulary: VocabularyShard, label_logits: Tensor, maxima: Tensor, total: Tensor
) -> tuple[Tensor, Tensor]:
    """The losses (n, 1) over all shards of the rows, and the divisors of the local exponentials (n, 1)."""
    global_maxima = vocabulary.all_reduce_max(maxima)
    global_total = vocabulary.all_reduce_sum(total * torch.exp(maxima - global_maxima))
    losses = global_maxima + global_total.log() - vocabulary.all_reduce_sum(label_logits)
    return losses, global_total * torch.exp(global_maxima - maxima)


def mask_factors(factors: Tensor | None, is_local: Tensor | None) -> Tensor | None:
    """The factors of labels with a local row, 0 for the others; None for 1."""
    if is_local is None:
        return factors
    return is_local.float() if factors is None else factors * is_local


def compute_factors(losses: Tensor, weights: Tensor | None, *, dft: bool) -> Tensor | None:
    """The factors of each loss (n, 1) and its gradient; None for 1."""
    if not dft:
        return weights
    likelihoods = torch.exp(-losses)
    return likelihoods if weights is None else likelihoods * weights


def apply_softcap(logits: Tensor, softcap: float) -> Tensor:
    """Replace logits by softcap tanh(logit / softcap); returns its derivative at each logit."""
    logits.div_(softcap).tanh_()
    cap_grads = 1 - logits.square()
    logits.mul_(softcap)
    return cap_grads


def exponentiate(logits: Tensor, exact: torch.dtype) -> tuple[Tensor, Tensor]:
    """Replace logits (n, V) by exp(logit - maximum of the row); returns maxima and sums of rows, (n, 1)."""
    maxima = torch.empty(len(logits), 1, dtype=exact, device=logits.device)
    total = torch.empty_like(maxima)
    # a few rows at a time stay in a core's cache for the next five passes
    rows = max(1, CACHED_ELEMENTS // logits.shape[1]) if logits.device.type == "cpu" else len(logits)
    for start in range(0, len(logits), rows):
        chunk = slice(start, start + rows)
        values = logits[chunk].to(exact)
        maxima[chunk] = values.amax(-1, keepdim=True)
        values.sub_(maxima[chunk])
        # on a CPU, a product and exp2 take half the time of exp
        values = values.mul_(LOG2_E).exp2_() if logits.device.type == "cpu" else values.exp_()
        torch.sum(values, -1, keepdim=True, out=total[chunk])
        if values.dtype != logits.dtype:
            logits[chunk] = values
    return maxima, total


CACHED_ELEMENTS = 2**19
LOG2_E = 1 / math.log(2)
