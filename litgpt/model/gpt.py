"""The decoder: embedding, blocks, norm and head, in plain PyTorch.

Axes: B batch, T tokens, D model width, V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from litgpt.model.attention import Attention, document_mask
from litgpt.model.config import Config
from litgpt.model.layers import MLPS, norm
from litgpt.model.rotary import angles

Head = Callable[[Tensor, Tensor, Tensor | None], Any]


class Block(nn.Module):
    """One layer: attention and feed-forward, each normed before and added after, in turn or side by side."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.norm_1 = norm(config)
        self.attention = Attention(config)
        self.norm_2 = None if config.shared_attention_norm else norm(config)
        self.mlp = MLPS[config.mlp_class_name](config)
        self.parallel_residual = config.parallel_residual
        self.dropout = config.dropout

    def forward(self, x_BTD: Tensor, cos: Tensor, sin: Tensor, mask_B1TU: Tensor | None) -> Tensor:
        normed = self.norm_1(x_BTD)
        attended = self._drop(self.attention(normed, cos, sin, mask_B1TU))
        if self.parallel_residual:
            mlp_input = normed if self.norm_2 is None else self.norm_2(x_BTD)
            return x_BTD + attended + self._drop(self.mlp(mlp_input))
        x_BTD = x_BTD + attended
        assert self.norm_2 is not None
        return x_BTD + self._drop(self.mlp(self.norm_2(x_BTD)))

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training) if self.dropout else x


class GPT(nn.Module):
    """A causal language model of the shape that a `Config` tells.

    Holds no buffers, so it may be built on the meta device and given memory by `to_empty`. With tied embeddings there
    is no `head` module: `output_weight` is the embedding's weight, one parameter under one name.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        assert config.padded_vocab_size is not None
        self.config = config
        self.embedding = nn.Embedding(config.padded_vocab_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = norm(config)
        tied = config.tie_embeddings
        self.head = None if tied else nn.Linear(config.n_embd, config.padded_vocab_size, bias=config.lm_head_bias)

    @classmethod
    def from_name(cls, name: str, **overrides: Any) -> "GPT":
        """A model of a named shape, with some of its fields changed."""
        return cls(Config.from_name(name, **overrides))

    @property
    def output_weight(self) -> Tensor:
        """The (V, D) matrix that turns hidden states into logits."""
        return self.embedding.weight if self.head is None else self.head.weight

    @property
    def output_bias(self) -> Tensor | None:
        """The (V,) bias of the logits, if the shape has one."""
        return None if self.head is None else self.head.bias

    def forward(
        self,
        ids_BT: Tensor,
        *,
        positions_BT: Tensor | None = None,
        documents_BT: Tensor | None = None,
        head: Head | None = None,
    ) -> Any:
        """The logits (B, T, V), or what `head` makes of the hidden states.

        Args:
            ids_BT: token numbers.
            positions_BT: each token's position; 0, 1, ... if None.
            documents_BT: each token's document; attention stays inside equal numbers. None: one document a row.
            head: called with hidden states (B, T, D), weight (V, D) and bias (V,) or None, so that a loss can be had
                without the whole logits.
        """
        positions = torch.arange(ids_BT.shape[1], device=ids_BT.device) if positions_BT is None else positions_BT
        cos, sin = angles(self.config, positions)
        mask_B1TU = None if documents_BT is None else document_mask(documents_BT)
        x_BTD = self._embed(ids_BT)
        for block in self.blocks:
            x_BTD = block(x_BTD, cos, sin, mask_B1TU)
        return (head or F.linear)(self.norm(x_BTD), self.output_weight, self.output_bias)

    def _embed(self, ids_BT: Tensor) -> Tensor:
        x_BTD = self.embedding(ids_BT)
        if self.config.scale_embeddings:
            # The published models round the factor to the weights' type before they multiply.
            x_BTD = x_BTD * torch.full((), self.config.n_embd**0.5, dtype=x_BTD.dtype, device=x_BTD.device)
        return F.dropout(x_BTD, self.config.dropout, self.training) if self.config.dropout else x_BTD
