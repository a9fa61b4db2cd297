"""NEFTune: noise on the embeddings while a model is being finetuned (Jain et al. 2023, arXiv 2310.05914)."""

from typing import Any

import torch
from torch import Tensor

from litgpt.model.gpt import GPT
from litgpt.model.surgery import Function, wrap_forward


def add_noise(model: GPT, alpha: float) -> None:
    """Add to every number of an embedding one drawn evenly from -m to m; only while the model is in training mode.

    m = alpha / sqrt(L D) for a document of L tokens and a width of D: the sum of squares over a document is alpha^2 / 3
    on average, however long it is. Padding counts for nothing. What the model adds or multiplies after the lookup
    (positions, Gemma's scale) comes after the noise. The numbers come from torch's generator of the device, which
    checkpoints hold.
    """
    sizes: list[Tensor | int] = []

    def measure_documents(forward: Function) -> Function:
        def measured(ids_BT: Tensor, **named: Any) -> Any:
            inputs = named.get("inputs")
            documents_BT = named.get("documents_BT") if inputs is None else inputs.documents_BT
            sizes[:] = [lengths(documents_BT, ids_BT.shape[1])]
            return forward(ids_BT, **named)

        return measured

    def add_to_output(forward: Function) -> Function:
        return lambda ids_BT: noisy(forward(ids_BT), alpha, sizes.pop()) if model.training else forward(ids_BT)

    wrap_forward(model, measure_documents)
    wrap_forward(model.embedding, add_to_output)


def lengths(documents_BT: Tensor | None, tokens: int) -> Tensor | int:
    """How many tokens the document of each token has, (B, T); padding (-1) is a document too. None: a row is one."""
    if documents_BT is None:
        return tokens
    numbers = documents_BT.long() + 1
    counts = torch.zeros(len(numbers), tokens + 1, dtype=torch.long, device=numbers.device)
    return counts.scatter_add_(1, numbers, torch.ones_like(numbers)).gather(1, numbers)


def noisy(x_BTD: Tensor, alpha: float, length: Tensor | int) -> Tensor:
    """Embeddings with noise, drawn in float32 at least; `length` is that of each token's document, (B, T) or one."""
    wide = torch.promote_types(x_BTD.dtype, torch.float32)
    noise = torch.empty(x_BTD.shape, dtype=wide, device=x_BTD.device).uniform_(-1, 1)
    spread = alpha * (torch.as_tensor(length, device=x_BTD.device) * x_BTD.shape[-1]).to(wide) ** -0.5
    return x_BTD + (noise * spread[..., None]).to(x_BTD.dtype)
