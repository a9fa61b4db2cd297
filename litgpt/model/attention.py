"""Causal self-attention with grouped keys and values.

Axes: B batch, H heads, T tokens (query), U tokens (key), S numbers of a head, D model width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from litgpt.model.config import Config
from litgpt.model.layers import norm
from litgpt.model.rotary import rotate


class Attention(nn.Module):
    """Self-attention over (B, T, D); its number of heads is read off its tensors, so that a part of it runs alone."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        assert config.head_size is not None and config.n_query_groups is not None
        self.head_size = config.head_size
        self.scale = (config.attention_scores_scalar or config.head_size) ** -0.5
        bias = config.bias or config.attn_bias
        kv_width = config.n_query_groups * config.head_size
        self.q = nn.Linear(config.n_embd, config.n_head * config.head_size, bias=bias)
        self.k = nn.Linear(config.n_embd, kv_width, bias=bias)
        self.v = nn.Linear(config.n_embd, kv_width, bias=bias)
        self.out = nn.Linear(config.n_head * config.head_size, config.n_embd, bias=config.bias)
        self.norm_q = norm(config, config.head_size) if config.norm_qk else None
        self.norm_k = norm(config, config.head_size) if config.norm_qk else None

    def forward(self, x_BTD: Tensor, cos: Tensor, sin: Tensor, mask_B1TU: Tensor | None) -> Tensor:
        """Attend; without a mask every token sees itself and all before it.

        Args:
            cos, sin: of `rotary.angles`.
            mask_B1TU: True where a query may see a key.
        """
        q, k, v = (project(x_BTD).unflatten(-1, (-1, self.head_size)) for project in (self.q, self.k, self.v))
        if self.norm_q is not None and self.norm_k is not None:
            q, k = self.norm_q(q), self.norm_k(k)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        y_BHTS = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask_B1TU,
            is_causal=mask_B1TU is None,
            scale=self.scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        return self.out(y_BHTS.transpose(1, 2).flatten(2))


def document_mask(documents_BT: Tensor) -> Tensor:
    """(B, 1, T, T), True where the query's token may see the key's: not later, and in the same document."""
    same = documents_BT[:, None, :, None] == documents_BT[:, None, None, :]
    tokens = documents_BT.shape[1]
    return same & torch.ones(tokens, tokens, dtype=torch.bool, device=documents_BT.device).tril()
