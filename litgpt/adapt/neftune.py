"""NEFTune: noise is added to the embeddings while a model is finetuned (Jain et al. 2023, arXiv 2310.05914)."""

from typing import Any

import torch
from torch import Tensor

from litgpt.model.gpt import GPT
from litgpt.model.surgery import Function, wrap_forward


def add_embedding_noise(model: GPT, alpha: float) -> None:
    """Add uniform noise from -m to m to every element of the embeddings; only while the model is in training mode.

    m = alpha / sqrt(L D) for a document of L tokens and a width of D, so the expected sum of squares over a document is
    alpha^2 / 3, however long it is. Padding is not counted. What the model adds or multiplies after the lookup
    (positions, Gemma's scale) is applied after the noise. The numbers come from torch's default generator of the
    device, which checkpoints contain.
    """
    lengths: list[Tensor | int] = []

    def record_lengths(forward: Function) -> Function:
        def forward_recorded(ids_BT: Tensor, **kwargs: Any) -> Any:
            inputs = kwargs.get("inputs")
            documents_BT = kwargs.get("documents_BT") if inputs is None else inputs.documents_BT
            lengths[:] = [count_document_tokens(documents_BT, ids_BT.shape[1])]
            return forward(ids_BT, **kwargs)

        return forward_recorded

    def add_noise(forward: Function) -> Function:
        def forward_noisy(ids_BT: Tensor) -> Tensor:
            x_BTD = forward(ids_BT)
            return add_uniform_noise(x_BTD, alpha, lengths.pop()) if model.training else x_BTD

        return forward_noisy

    wrap_forward(model, record_lengths)
    wrap_forward(model.embedding, add_noise)


def count_document_tokens(documents_BT: Tensor | None, tokens: int) -> Tensor | int:
    """The number of tokens in the document of each token, (B, T); padding (-1) counts as one, None as one per row."""
    if documents_BT is None:
        return tokens
    numbers = documents_BT.long() + 1
    counts = torch.zeros(len(numbers), tokens + 1, dtype=torch.long, device=numbers.device)
    return counts.scatter_add_(1, numbers, torch.ones_like(numbers)).gather(1, numbers)


def add_uniform_noise(x_BTD: Tensor, alpha: float, length: Tensor | int) -> Tensor:
    """Embeddings with noise, drawn in float32 or wider; `length` is of each token's document, (B, T) or a scalar."""
    dtype = torch.promote_types(x_BTD.dtype, torch.float32)
    noise = torch.empty(x_BTD.shape, dtype=dtype, device=x_BTD.device).uniform_(-1, 1)
    bound = alpha * (torch.as_tensor(length, device=x_BTD.device) * x_BTD.shape[-1]).to(dtype) ** -0.5
    return x_BTD + (noise * bound[..., None]).to(x_BTD.dtype)
