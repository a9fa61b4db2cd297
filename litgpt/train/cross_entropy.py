"""Cross-entropy over the vocabulary that never holds the logits of all tokens at once.

Axes: N tokens, D model width, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from litgpt.data.stream.batch import IGNORE
from litgpt.model.gpt import compute_logits
from litgpt.parallel.token_sharding import VocabularyShard


@dataclass(frozen=True)
class Labels:
    """What each position should give, and how much its loss counts.

    Attributes:
        labels_BT: token numbers, `IGNORE` where there is none.
        weights_BT: factors of the losses; None for 1.
        dft: multiply each loss by its own probability, which is taken as a constant: a token that the model finds
            unlikely moves it less ("dynamic fine-tuning", Wu et al. 2025, eq. 9).
        losses_N: takes in the loss of every label in nats, without factors, if it is there; zeros before.
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
    """The summed negative log-likelihood of the labels in nats, through the whole (B, T, V) logits.

    Args:
        vocabulary: whose rows weight and bias are, if the other rows lie elsewhere.
    """
    scores = compute_logits(hidden_BTD, weight_VD, bias_V, softcap)
    scores = scores if vocabulary is None else vocabulary.gather_logits(scores)
    upcast = scores if scores.dtype == torch.float64 else scores.float()
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
    """The same sum, `chunk_rows` tokens at a time.

    The gradients of hidden states and weight are made along with the loss, while a chunk's probabilities are at hand
    (Hsu et al. 2024, Liger Kernel, section 3.2), so no logits are kept or computed twice. Ignored tokens cost nothing.

    Args:
        hidden_BTD: what the head is applied to.
        softcap: logits go through softcap tanh(logit / softcap).
        vocabulary: whose rows weight and bias are, if the other rows lie elsewhere; the gradient of the hidden states
            is then this rank's part of a sum over all of them.
    """
    device = hidden_BTD.device.type
    if torch.is_autocast_enabled(device):
        compute = torch.get_autocast_dtype(device)
        hidden_BTD, weight_VD = hidden_BTD.to(compute), weight_VD.to(compute)
        bias_V = None if bias_V is None else bias_V.to(compute)
    with torch.autocast(device, enabled=False):
        return _Chunked.apply(hidden_BTD.flatten(0, 1), weight_VD, bias_V, target, chunk_rows, softcap, vocabulary)


class _Chunked(torch.autograd.Function):
    """Sum of losses whose gradients are ready when the forward pass ends."""

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
        kept = labels_N.ne(IGNORE).nonzero().squeeze(1)
        labels, inputs = labels_N[kept], hidden_ND[kept]
        exact = torch.float64 if hidden_ND.dtype == torch.float64 else torch.float32
        loss = torch.zeros((), dtype=exact, device=hidden_ND.device)
        weights = None if target.weights_BT is None else target.weights_BT.flatten()[kept, None].to(exact)
        wanted = ctx.needs_input_grad[:3]
        gradients = _Gradients(inputs, weight_VD, bias_V, exact, head=any(wanted[1:])) if any(wanted) else None
        buffer = torch.empty(min(chunk_rows, len(labels)), len(weight_VD), dtype=inputs.dtype, device=inputs.device)
        for start in range(0, len(labels), chunk_rows):
            part = slice(start, min(start + chunk_rows, len(labels)))
            scores = torch.mm(inputs[part], weight_VD.T, out=buffer[: part.stop - start])
            if bias_V is not None:
                scores += bias_V
            slopes = None if softcap is None else _cap(scores, softcap)
            here, rows = _rows_of(labels[part], len(weight_VD), vocabulary)
            picked = scores.gather(1, rows[:, None])
            highest, total = _exponentials(scores, exact)
            if vocabulary is None or here is None:
                losses = highest + total.log() - picked
            else:
                losses, total = _over_ranks(vocabulary, picked * here, highest, total)
            if target.losses_N is not None:
                target.losses_N[kept[part]] = losses[:, 0].to(target.losses_N.dtype)
            factors = _factors(losses, None if weights is None else weights[part], dft=target.dft)
            loss += (losses if factors is None else losses * factors).sum()
            if gradients is not None:
                gradients.add(part, _times(scores, slopes, factors), total)
                gradients.take_labels(part, rows, slopes, _product(factors, here))
        if gradients is not None:
            hidden = torch.zeros_like(hidden_ND).index_copy_(0, kept, gradients.hidden)
            weight = gradients.weight.to(weight_VD.dtype) if wanted[1] else None
            bias = gradients.bias.to(bias_V.dtype) if bias_V is not None and wanted[2] else None
            ctx.save_for_backward(hidden, weight, bias)
            ctx.scaled = False
        return loss

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        # The saved gradients belong to this node alone, so they are scaled in place. A backward pass that is split into
        # halves comes here twice with the same scale; the second time they are ready.
        if not ctx.scaled:
            for saved in ctx.saved_tensors:
                if saved is not None:
                    saved.data.mul_(scale)  # as itself it could not be looked at again
            ctx.scaled = True
        return (*ctx.saved_tensors, None, None, None, None)


class _Gradients:
    """Sums over chunks of the loss's gradients: probabilities minus one at the label, times the other factor."""

    def __init__(
        self, inputs_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, exact: torch.dtype, *, head: bool
    ) -> None:
        self.inputs, self.weight_VD, self.head = inputs_ND, weight_VD, head
        self.hidden = torch.empty_like(inputs_ND)
        self.weight = torch.zeros(weight_VD.shape if head else (0,), dtype=exact, device=weight_VD.device)
        self.bias = torch.zeros(len(weight_VD) if bias_V is not None else 0, dtype=exact, device=weight_VD.device)

    def add(self, part: slice, exponentials: Tensor, total: Tensor) -> None:
        """Add a chunk. Its exponentials are not divided by their total (n, 1): the smaller factor is."""
        self.hidden[part] = (exponentials @ self.weight_VD) / total
        if not self.head:
            return
        share = (self.inputs[part] / total).to(exponentials.dtype)
        if self.weight.dtype == exponentials.dtype:
            self.weight.addmm_(exponentials.T, share)
        else:
            self.weight += exponentials.T @ share
        if len(self.bias):
            self.bias += (exponentials / total).sum(0)

    def take_labels(self, part: slice, labels: Tensor, slopes: Tensor | None, factors: Tensor | None) -> None:
        """Subtract what a chunk's labels themselves contribute, times the slope of the cap and the loss's factor."""
        slope = None if slopes is None else slopes.gather(1, labels[:, None])
        ones = torch.ones_like(labels, dtype=self.bias.dtype)[:, None]
        self.hidden[part] -= _times(self.weight_VD[labels], slope, factors)
        if not self.head:
            return
        inputs = _times(self.inputs[part].clone(), slope, factors)
        self.weight.index_add_(0, labels, inputs.to(self.weight.dtype), alpha=-1)
        if len(self.bias):
            self.bias.index_add_(0, labels, _times(ones, slope, factors)[:, 0], alpha=-1)


def _times(values: Tensor, *factors: Tensor | None) -> Tensor:
    """`values`, multiplied in place by those factors that there are."""
    for factor in factors:
        if factor is not None:
            values.mul_(factor.to(values.dtype))
    return values


def _rows_of(labels: Tensor, rows: int, vocabulary: VocabularyShard | None) -> tuple[Tensor | None, Tensor]:
    """Whether each label's row is among ours (n, 1), None if all are, and its number (n,), any where it is not."""
    if vocabulary is None:
        return None, labels
    numbers = labels - vocabulary.first_row
    return ((numbers >= 0) & (numbers < rows))[:, None], numbers.clamp(0, rows - 1)


def _over_ranks(vocabulary: VocabularyShard, picked: Tensor, highest: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
    """The losses (n, 1), and what the exponentials here are to be divided by, out of all parts of the rows."""
    everywhere = vocabulary.all_reduce_max(highest)
    whole = vocabulary.all_reduce_sum(total * torch.exp(highest - everywhere))
    return everywhere + whole.log() - vocabulary.all_reduce_sum(picked), whole * torch.exp(everywhere - highest)


def _product(factors: Tensor | None, here: Tensor | None) -> Tensor | None:
    """Factors of the labels whose rows are here, and none for the others; None for 1."""
    if here is None:
        return factors
    return here.float() if factors is None else factors * here


def _factors(losses: Tensor, weights: Tensor | None, *, dft: bool) -> Tensor | None:
    """What each loss (n, 1) and its gradient are multiplied by."""
    if not dft:
        return weights
    likelihoods = torch.exp(-losses)
    return likelihoods if weights is None else likelihoods * weights


def _cap(scores: Tensor, softcap: float) -> Tensor:
    """Replace scores by softcap tanh(score / softcap); the slope of that at each, of the same shape."""
    scores.div_(softcap).tanh_()
    slopes = 1 - scores.square()
    scores.mul_(softcap)
    return slopes


def _exponentials(scores: Tensor, exact: torch.dtype) -> tuple[Tensor, Tensor]:
    """Replace scores (n, V) by exp(score - highest of its row); give those highest (n, 1) and the rows' sums (n, 1)."""
    highest = torch.empty(len(scores), 1, dtype=exact, device=scores.device)
    total = torch.empty_like(highest)
    # a few rows at a time stay in a core's cache through the five passes that follow
    rows = max(1, CACHED_ELEMENTS // scores.shape[1]) if scores.device.type == "cpu" else len(scores)
    for start in range(0, len(scores), rows):
        part = slice(start, start + rows)
        values = scores[part].to(exact)
        highest[part] = values.amax(-1, keepdim=True)
        torch.sum(values.sub_(highest[part]).exp_(), -1, keepdim=True, out=total[part])
        if values.dtype != scores.dtype:
            scores[part] = values
    return highest, total


CACHED_ELEMENTS = 2**19
