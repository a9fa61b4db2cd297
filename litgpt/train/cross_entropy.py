"""Cross-entropy over the vocabulary that never holds the logits of all tokens at once.

Axes: N tokens, D model width, V vocabulary.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from litgpt.data.batch import IGNORE
from litgpt.model.gpt import logits


def plain_cross_entropy(
    hidden_BTD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, softcap: float | None = None, *, labels_BT: Tensor
) -> Tensor:
    """The summed negative log-likelihood of the labels in nats, through the whole (B, T, V) logits."""
    scores = logits(hidden_BTD, weight_VD, bias_V, softcap)
    upcast = scores if scores.dtype == torch.float64 else scores.float()
    return F.cross_entropy(upcast.flatten(0, 1), labels_BT.flatten(), ignore_index=IGNORE, reduction="sum")


def chunked_cross_entropy(
    hidden_BTD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    softcap: float | None = None,
    *,
    labels_BT: Tensor,
    chunk_rows: int,
) -> Tensor:
    """The same sum, `chunk_rows` tokens at a time.

    The gradients of hidden states and weight are made along with the loss, while a chunk's probabilities are at hand
    (Hsu et al. 2024, Liger Kernel, section 3.2), so no logits are kept or computed twice. Ignored tokens cost nothing.

    Args:
        hidden_BTD: what the head is applied to.
        softcap: logits go through softcap tanh(logit / softcap).
        labels_BT: the token that each position should give, `IGNORE` where there is none.
    """
    device = hidden_BTD.device.type
    if torch.is_autocast_enabled(device):
        compute = torch.get_autocast_dtype(device)
        hidden_BTD, weight_VD = hidden_BTD.to(compute), weight_VD.to(compute)
        bias_V = None if bias_V is None else bias_V.to(compute)
    with torch.autocast(device, enabled=False):
        return _Chunked.apply(hidden_BTD.flatten(0, 1), weight_VD, bias_V, labels_BT.flatten(), chunk_rows, softcap)


class _Chunked(torch.autograd.Function):
    """Sum of losses whose gradients are ready when the forward pass ends."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        labels_N: Tensor,
        chunk_rows: int,
        softcap: float | None,
    ) -> Tensor:
        kept = labels_N.ne(IGNORE).nonzero().squeeze(1)
        labels, inputs = labels_N[kept], hidden_ND[kept]
        exact = torch.float64 if hidden_ND.dtype == torch.float64 else torch.float32
        loss = torch.zeros((), dtype=exact, device=hidden_ND.device)
        gradients = _Gradients(inputs, weight_VD, bias_V, exact) if any(ctx.needs_input_grad[:3]) else None
        buffer = torch.empty(min(chunk_rows, len(labels)), len(weight_VD), dtype=inputs.dtype, device=inputs.device)
        for start in range(0, len(labels), chunk_rows):
            part = slice(start, min(start + chunk_rows, len(labels)))
            scores = torch.mm(inputs[part], weight_VD.T, out=buffer[: part.stop - start])
            if bias_V is not None:
                scores += bias_V
            slopes = None if softcap is None else _cap(scores, softcap)
            picked = scores.gather(1, labels[part, None])
            highest, total = _exponentials(scores, exact)
            loss += (highest + total.log() - picked).sum()
            if gradients is not None:
                gradients.add(part, scores if slopes is None else scores.mul_(slopes), total)
                gradients.take_labels(part, labels[part], slopes)
        if gradients is not None:
            hidden = torch.zeros_like(hidden_ND).index_copy_(0, kept, gradients.hidden)
            bias = None if bias_V is None else gradients.bias.to(bias_V.dtype)
            ctx.save_for_backward(hidden, gradients.weight.to(weight_VD.dtype), bias)
        return loss

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        # the saved gradients belong to this node alone and it runs once, so they are scaled in place
        return (*(None if saved is None else saved.mul_(scale) for saved in ctx.saved_tensors), None, None, None)


class _Gradients:
    """Sums over chunks of the loss's gradients: probabilities minus one at the label, times the other factor."""

    def __init__(self, inputs_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, exact: torch.dtype) -> None:
        self.inputs, self.weight_VD = inputs_ND, weight_VD
        self.hidden = torch.empty_like(inputs_ND)
        self.weight = torch.zeros(weight_VD.shape, dtype=exact, device=weight_VD.device)
        self.bias = torch.zeros(len(weight_VD) if bias_V is not None else 0, dtype=exact, device=weight_VD.device)

    def add(self, part: slice, exponentials: Tensor, total: Tensor) -> None:
        """Add a chunk. Its exponentials are not divided by their total (n, 1): the smaller factor is."""
        share = (self.inputs[part] / total).to(exponentials.dtype)
        self.hidden[part] = (exponentials @ self.weight_VD) / total
        if self.weight.dtype == exponentials.dtype:
            self.weight.addmm_(exponentials.T, share)
        else:
            self.weight += exponentials.T @ share
        if len(self.bias):
            self.bias += (exponentials / total).sum(0)

    def take_labels(self, part: slice, labels: Tensor, slopes: Tensor | None) -> None:
        """Subtract what a chunk's labels themselves contribute, each times the slope of its cap."""
        inputs, rows = self.inputs[part], self.weight_VD[labels]
        ones = torch.ones_like(labels, dtype=self.bias.dtype)
        if slopes is not None:
            slope = slopes.gather(1, labels[:, None])
            inputs, rows, ones = inputs * slope, rows * slope, slope[:, 0].to(ones.dtype)
        self.hidden[part] -= rows
        self.weight.index_add_(0, labels, inputs.to(self.weight.dtype), alpha=-1)
        if len(self.bias):
            self.bias.index_add_(0, labels, ones, alpha=-1)


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
