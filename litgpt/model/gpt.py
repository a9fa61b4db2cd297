"""The decoder: embedding, blocks, norm and head, in plain PyTorch.

Axes: B batch, T tokens, D model width, V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from litgpt.errors import UserError
from litgpt.model.attention import Attention, Cache, LayerCache, Shared, share
from litgpt.model.config import Config
from litgpt.model.layers import GatedMLP, PlainMLP, norm
from litgpt.model.portion import Portion

Head = Callable[[Tensor, Tensor, Tensor | None, float | None], Any]


def logits(hidden_BTD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, softcap: float | None) -> Tensor:
    """(B, T, V) scores of the next token, through softcap tanh(score / softcap) where the shape caps them."""
    scores = F.linear(hidden_BTD, weight_VD, bias_V)
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)


def whole_logits(portion: Portion, scores_BPV: Tensor) -> Tensor:
    """(B, T, V), lengthening included, out of every process's tokens and rows of the vocabulary."""
    if portion.vocabulary is not None:
        scores_BPV = portion.vocabulary.gathered(scores_BPV)
    return portion.together(scores_BPV)


def attention(config: Config, layer: int) -> nn.Module:
    """The attention of a layer."""
    if config.latent_attention:
        from litgpt.model.latent import LatentAttention

        return LatentAttention(config, layer)
    return Attention(config, layer)


def feed_forward(config: Config, layer: int) -> nn.Module:
    """The feed-forward part of a layer."""
    if config.has_experts(layer):
        from litgpt.model.moe import MoE

        return MoE(config)
    return PlainMLP(config) if config.mlp_class_name == "GptNeoxMLP" else GatedMLP(config)


class Block(nn.Module):
    """One layer: attention and feed-forward, in turn or side by side, each normed before, after, or both."""

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        self.norm_1 = norm(config) if config.norm_1 else nn.Identity()
        self.attention = attention(config, layer)
        self.norm_1_post = norm(config) if config.post_attention_norm else nn.Identity()
        self.norm_2 = norm(config) if config.norm_2 and not config.shared_attention_norm else nn.Identity()
        self.mlp = feed_forward(config, layer)
        self.norm_2_post = norm(config) if config.post_mlp_norm else nn.Identity()
        self.parallel, self.shared_norm = config.parallel_residual, config.shared_attention_norm
        self.dropout, self.residual_scale = config.dropout, config.residual_scale

    def forward(self, x_BTD: Tensor, shared: Shared, cache: LayerCache | None = None) -> Tensor:
        normed = self.norm_1(x_BTD)
        attended = self._added(self.norm_1_post(self.attention(normed, shared, cache)))
        if self.parallel:
            mlp_input = normed if self.shared_norm else self.norm_2(x_BTD)
            return x_BTD + attended + self._added(self.norm_2_post(self.mlp(mlp_input)))
        x_BTD = x_BTD + attended
        return x_BTD + self._added(self.norm_2_post(self.mlp(self.norm_2(x_BTD))))

    def _added(self, x: Tensor) -> Tensor:
        """A part's output as it is added to the residual stream."""
        x = F.dropout(x, self.dropout, self.training) if self.dropout else x
        return x if self.residual_scale == 1 else x * self.residual_scale


class Elsewhere(nn.Module):
    """Stands in for a part of a model that lies in another process; is not run."""


class GPT(nn.Module):
    """A causal language model of the shape that a `Config` tells.

    Holds no buffers, so it may be built on the meta device and given memory by `to_empty`. With tied embeddings there
    is no `head` module: `output_weight` is the embedding's weight, one parameter under one name.

    Attributes:
        portion: what this process works on of a batch, if others work on the rest. The model is given whole batches all
            the same, and gives whole logits; only `head` sees hidden states of its own tokens alone.
    """

    portion: Portion | None = None

    def __init__(self, config: Config) -> None:
        super().__init__()
        assert config.padded_vocab_size is not None
        self.config = config
        self.embedding = nn.Embedding(config.padded_vocab_size, config.n_embd)
        learned = config.position_embedding == "learned"
        self.position_embedding = nn.Embedding(config.block_size, config.n_embd) if learned else None
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.norm = norm(config)
        tied = config.tie_embeddings
        self.head = None if tied else nn.Linear(config.n_embd, config.padded_vocab_size, bias=config.lm_head_bias)

    @classmethod
    def from_name(cls, name: str, **overrides: Any) -> "GPT":
        """A model of a named shape, with some of its fields changed."""
        return cls(Config.from_name(name, **overrides))

    @property
    def own_blocks(self) -> list[nn.Module]:
        """The blocks that lie in this process."""
        return [block for block in self.blocks if not isinstance(block, Elsewhere)]

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
        cache: Cache | None = None,
        layers: range | None = None,
        hidden_BTD: Tensor | None = None,
    ) -> Any:
        """The logits (B, T, V), or what `head` makes of the hidden states.

        Args:
            ids_BT: token numbers.
            positions_BT: each token's position; 0, 1, ... if None, counted on from the cached tokens.
            documents_BT: each token's document; attention stays inside equal numbers. None: one document a row.
            head: called with hidden states (B, T, D; of own tokens), weight (V, D), bias (V,) or None, and the cap on
                logits or None, so that a loss can be had without the whole logits.
            cache: keys and values of the tokens before these; takes in those of these.
            layers: the blocks that are run, all if None. Without the last, their hidden states (B, T, D; of own tokens)
                are what comes out.
            hidden_BTD: what came out of the blocks before `layers`; None if the first is among them.

        Raises:
            UserError: if positions or documents are given beside a cache that holds tokens.
        """
        cached = 0 if cache is None else cache.length
        if cached and (positions_BT is not None or documents_BT is not None):
            raise UserError("positions_BT, documents_BT: not beside a cache that holds tokens; give None")
        positions = positions_BT
        if positions is None:
            positions = torch.arange(cached, cached + ids_BT.shape[1], device=ids_BT.device)
        tokens = ids_BT.shape[1]
        if self.portion is not None:
            ids_BT, positions = self.portion.own(ids_BT, 0), self.portion.padded(positions, 0)
            documents_BT = None if documents_BT is None else self.portion.padded(documents_BT, -1)
        exchange = None if self.portion is None else self.portion.exchange
        shared = share(self.config, positions, documents_BT=documents_BT, cached=cached, exchange=exchange)
        x_BTD = hidden_BTD
        if x_BTD is None:
            x_BTD = self._embed(ids_BT, positions if self.portion is None else self.portion.own(positions, 0))
        layers = range(len(self.blocks)) if layers is None else layers
        x_BTD = self.through(layers, x_BTD, shared, cache)
        if cache is not None:
            cache.advance(ids_BT.shape[1])
        if layers.stop < len(self.blocks):
            return x_BTD
        hidden = self.norm(x_BTD)
        if self.config.logit_scale != 1:
            hidden = hidden * self.config.logit_scale
        output = (self.output_weight, self.output_bias, self.config.final_logit_softcapping)
        if head is not None:
            return head(hidden, *output)
        scores = logits(hidden, *output)
        return scores if self.portion is None else whole_logits(self.portion, scores)[:, :tokens]

    def through(self, layers: range, x_BTD: Tensor, shared: Shared, cache: Cache | None = None) -> Tensor:
        """What comes out of the last of these blocks, (B, T, D), for what goes into the first."""
        for layer in layers:
            x_BTD = self.blocks[layer](x_BTD, shared, None if cache is None else cache.layers[layer])
        return x_BTD

    def _embed(self, ids_BT: Tensor, positions: Tensor) -> Tensor:
        x_BTD = self.embedding(ids_BT)
        if self.config.scale_embeddings:
            # The published models round the factor to the weights' type before they multiply.
            x_BTD = x_BTD * torch.full((), self.config.n_embd**0.5, dtype=x_BTD.dtype, device=x_BTD.device)
        if self.config.embedding_scale != 1:
            x_BTD = x_BTD * self.config.embedding_scale
        if self.position_embedding is not None:
            x_BTD = x_BTD + self.position_embedding(positions)
        return F.dropout(x_BTD, self.config.dropout, self.training) if self.config.dropout else x_BTD
