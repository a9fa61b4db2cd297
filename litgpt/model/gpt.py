"""The decoder: embedding, blocks, norm and head, in plain PyTorch.

Axes: B batch, T tokens, D model width, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from litgpt.errors import UserError
from litgpt.model.attention import Attention, KVCache, KVCacheLayer
from litgpt.model.attention_inputs import AttentionInputs, build_attention_inputs, find_blocks
from litgpt.model.audio import AudioTower
from litgpt.model.audio_config import AudioShape
from litgpt.model.config import Config
from litgpt.model.latent import LatentAttention
from litgpt.model.layers import GatedMLP, PlainMLP, build_norm
from litgpt.model.media import Media, find_sources
from litgpt.model.moe import Experts, MoE
from litgpt.model.tower_config import TowerShape
from litgpt.model.vision import FeaturePlaces, Tower

Head = Callable[[Tensor, Tensor, Tensor | None, float | None], Any]
RANDOM_FILLS = (nn.init.kaiming_uniform_, nn.init.uniform_, nn.init.normal_, Tensor.uniform_, Tensor.normal_)


class SkipRandomFills(TorchFunctionMode):
    """Leaves tensors of the meta device as they are, for which the shapes of random values take half of the time."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in RANDOM_FILLS and args:
            return args[0]
        return func(*args, **(kwargs or {}))


def compute_logits(hidden_BTD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, softcap: float | None) -> Tensor:
    """Logits of the next token, (B, T, V); softcap tanh(logit / softcap) if the model caps them."""
    return cap_logits(F.linear(hidden_BTD, weight_VD, bias_V), softcap)


def cap_logits(logits: Tensor, softcap: float | None) -> Tensor:
    """softcap tanh(logit / softcap), or the same logits for None."""
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def build_feed_forward(config: Config, layer: int) -> nn.Module:
    """The feed-forward module of a layer."""
    if config.has_experts(layer):
        return MoE(config, layer)
    return PlainMLP(config) if config.mlp_class_name == "GptNeoxMLP" else GatedMLP(config)


class Block(nn.Module):
    """One layer: attention and feed-forward, in turn or in parallel, each with a norm before, after, or both."""

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        self.norm_1 = build_norm(config) if config.norm_1 else nn.Identity()
        self.attention = (LatentAttention if config.latent_attention else Attention)(config, layer)
        self.norm_1_post = build_norm(config) if config.post_attention_norm else nn.Identity()
        has_norm_2 = config.norm_2 and not config.shared_attention_norm
        self.norm_2 = build_norm(config) if has_norm_2 else nn.Identity()
        self.mlp = build_feed_forward(config, layer)
        self.norm_2_post = build_norm(config) if config.post_mlp_norm else nn.Identity()
        self.parallel, self.shared_norm = config.parallel_residual, config.shared_attention_norm
        self.dropout, self.residual_scale = config.dropout, config.residual_scale

    @property
    def experts(self) -> Experts | None:
        """The experts of the layer, None if its feed-forward is dense."""
        return getattr(self.mlp, "experts", None)

    def forward(self, x_BTD: Tensor, inputs: AttentionInputs, cache: KVCacheLayer | None = None) -> Tensor:
        """Attention and feed-forward, each with its residual; (B, T, D) -> (B, T, D)."""
        normed = self.norm_1(x_BTD)
        attention_BTD = self._scale_residual(self.norm_1_post(self.attention(normed, inputs, cache)))
        if self.parallel:
            mlp_input = normed if self.shared_norm else self.norm_2(x_BTD)
            return x_BTD + attention_BTD + self._scale_residual(self.norm_2_post(self._apply_mlp(mlp_input, inputs)))
        x_BTD = x_BTD + attention_BTD
        return x_BTD + self._scale_residual(self.norm_2_post(self._apply_mlp(self.norm_2(x_BTD), inputs)))

    def _apply_mlp(self, x_BTD: Tensor, inputs: AttentionInputs) -> Tensor:
        return self.mlp(x_BTD) if self.experts is None else self.mlp(x_BTD, inputs.routing)

    def _scale_residual(self, x: Tensor) -> Tensor:
        """Apply dropout and the residual scale to what is added to the residual stream."""
        x = F.dropout(x, self.dropout, self.training) if self.dropout else x
        return x if self.residual_scale == 1 else x * self.residual_scale


class PredictionBlock(Block):
    """A layer after the last that predicts one token further ahead than the layer before (DeepSeek-AI 2024, V3, 2.2).

    It joins the normalized output of the layer before with the embedding of the token that this layer predicted: the
    input has both, embedding first, (B, T, 2 D), and the output is normalized, (B, T, D).
    """

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__(config, layer)
        self.norm_embedding, self.norm_hidden = build_norm(config), build_norm(config)
        self.projection = nn.Linear(2 * config.n_embd, config.n_embd, bias=False)
        self.norm_output = build_norm(config)

    def forward(self, x_BTD: Tensor, inputs: AttentionInputs, cache: KVCacheLayer | None = None) -> Tensor:
        """The hidden states for the prediction; (B, T, 2 D) -> (B, T, D)."""
        embedding_BTD, hidden_BTD = x_BTD.chunk(2, -1)
        joined = torch.cat([self.norm_embedding(embedding_BTD), self.norm_hidden(hidden_BTD)], -1)
        return self.norm_output(super().forward(self.projection(joined), inputs, cache))


class MissingLayer(nn.Module):
    """Placeholder for a layer that this instance of the model does not have; never called."""


class GPT(nn.Module):
    """A causal language model with the architecture of a `Config`.

    It has no buffers, so it can be built on the meta device and given memory by `to_empty`. With tied embeddings there
    is no `head` module: `output_weight` is the embedding's weight, one parameter under one name. A reward model, whose
    config has the output `score`, has a module `score` instead, with one row: V is 1 in its outputs.

    `blocks` are the layers, and after them the prediction layers, which only training runs. A model with a vision tower
    has it as `vision`, one with an audio tower as `audio`; `embed_media` runs them and returns the `hidden_BTD` of
    texts with images or sounds.

    Inputs:
        ids_BT: token ids.
        positions_BT: the position of each token; 0, 1, ... if None, after those of the cached tokens. (B, 3, T), of
            time, row and column, for a model with `rope_sections` and images.
        documents_BT: the document of each token; attention stays within a document. None for one document per row.
        prompts_BT: whether a token is of a prompt, whose tokens attend to each other in a model with `prompt_blocks`;
            None for attention to earlier tokens only.
        inputs: the attention inputs, instead of `positions_BT`, `documents_BT` and `prompts_BT`.
        head: called with hidden states (B, T, D), weight (V, D), bias (V,) or None, and the cap on logits or None, e.g.
            to compute a loss without all logits. None for `compute_logits`.
        cache: keys and values of the tokens before these; those of these are appended.
        layers: range of the blocks to run, None for all. If the last block is not among them, the output is their
            hidden states (B, T, D).
        hidden_BTD: the output of the blocks before `layers`, or embeddings in place of those of `ids_BT` if `layers`
            start with the first, with what is added after the first blocks beside them, as of `embed_media`; None for
            those.
        media: images and sounds at the places of their token in `ids_BT`, row by row, to run the first of the blocks
            with the output of `embed_media`; None for none.
        predictions: for each prediction layer to run, from the first, the tokens (B, T) that the layer before it
            predicts, and the function to call as `head`.

    Outputs:
        the logits (B, T, V), or what `head` returns; with `predictions`, a list of it and what their functions return.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        assert config.padded_vocab_size is not None
        self.config = config
        self.embedding = nn.Embedding(config.padded_vocab_size, config.n_embd)
        learned = config.position_embedding == "learned"
        self.position_embedding = nn.Embedding(config.block_size, config.n_embd) if learned else None
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.blocks.extend(PredictionBlock(config, layer) for layer in range(config.n_layer, config.n_blocks))
        self.norm = build_norm(config)
        self.head_input = nn.Identity()  # where ranks gather the tokens that they have sharded
        self.score = nn.Linear(config.n_embd, 1, bias=False) if config.output == "score" else None
        has_head = self.score is None and not config.tie_embeddings
        self.head = nn.Linear(config.n_embd, config.padded_vocab_size, config.lm_head_bias) if has_head else None
        vision = None if config.vision is None else TowerShape.from_values(config.vision)
        self.vision = None if vision is None else Tower(vision, config.n_embd)
        audio = None if config.audio is None else AudioShape.from_values(config.audio)
        self.audio = None if audio is None else AudioTower(audio, config.n_embd)
        self.feature_places = FeaturePlaces()

    @classmethod
    def from_name(cls, name: str, **overrides: Any) -> "GPT":
        """Build a model by name, with some config fields overridden."""
        return cls(Config.from_name(name, **overrides))

    @classmethod
    def on_meta(cls, config: Config, dtype: torch.dtype | None = None) -> "GPT":
        """A model on the meta device, so without memory for its weights.

        Args:
            dtype: of all weights but those that the shape keeps in float32; None for torch's default type.
        """
        default = torch.get_default_dtype()
        torch.set_default_dtype(dtype or default)
        try:
            with torch.device("meta"), SkipRandomFills():
                return cls(config)
        finally:
            torch.set_default_dtype(default)

    @property
    def towers(self) -> list[Tower | AudioTower]:
        """The towers of the model that this instance has."""
        return [tower for tower in (self.vision, self.audio) if isinstance(tower, Tower | AudioTower)]

    @property
    def local_blocks(self) -> list[Block]:
        """The blocks, without placeholders for missing ones."""
        return [block for block in self.blocks if isinstance(block, Block)]

    @property
    def prediction_blocks(self) -> list[PredictionBlock]:
        """The prediction layers, without placeholders for missing ones."""
        return [block for block in self.local_blocks if isinstance(block, PredictionBlock)]

    @property
    def trains_predictions(self) -> bool:
        """Whether any weight of the prediction layers is trained; otherwise training does not run them."""
        return any(parameter.requires_grad for block in self.prediction_blocks for parameter in block.parameters())

    @property
    def output_weight(self) -> Tensor:
        """The (V, D) matrix that projects hidden states to logits, or to scores."""
        if self.score is not None:
            return self.score.weight
        return self.embedding.weight if self.head is None else self.head.weight

    @property
    def output_bias(self) -> Tensor | None:
        """The (V,) bias of the logits, None if the model has none."""
        return None if self.head is None else self.head.bias

    def forward(
        self,
        ids_BT: Tensor,
        *,
        positions_BT: Tensor | None = None,
        documents_BT: Tensor | None = None,
        prompts_BT: Tensor | None = None,
        inputs: AttentionInputs | None = None,
        head: Head | None = None,
        cache: KVCache | None = None,
        layers: range | None = None,
        hidden_BTD: Tensor | None = None,
        media: Media | None = None,
        predictions: Sequence[tuple[Tensor, Head]] = (),
    ) -> Any:
        """Compute logits, or what `head` returns; see the class for arguments."""
        if inputs is None:
            inputs = self._build_inputs(ids_BT, positions_BT, documents_BT, prompts_BT, cache)
        layers = range(self.config.n_layer) if layers is None else layers
        hidden_BTD = hidden_BTD if media is None else self.embed_media(ids_BT, media, inputs.positions)
        x_BTD = self._embed(ids_BT, inputs.positions) if hidden_BTD is None else hidden_BTD
        x_BTD = self.run_blocks(layers, x_BTD, inputs, cache)
        if cache is not None:
            cache.advance(ids_BT.shape[1])
        if layers.stop < self.config.n_layer:
            return x_BTD
        hidden_BTD = self.norm(x_BTD)
        output = self._apply_head(hidden_BTD, head or compute_logits)
        return [output, *self._predict(hidden_BTD, inputs, predictions)] if predictions else output

    def run_blocks(self, layers: range, x_BTD: Tensor, inputs: AttentionInputs, cache: KVCache | None = None) -> Tensor:
        """Run some blocks in order, (B, T, D) -> (B, T, D).

        Beside the input there may be what is added to the outputs of the first K of them, (B, T, (1 + K) D), and what
        is left is beside the output.
        """
        x_BTD, *added = x_BTD.split(self.config.n_embd, -1)
        for layer in layers:
            x_BTD = self.blocks[layer](x_BTD, inputs, None if cache is None else cache.layers[layer])
            x_BTD = x_BTD + added.pop(0) if added else x_BTD
        return torch.cat([x_BTD, *added], -1) if added else x_BTD

    def _build_inputs(
        self,
        ids_BT: Tensor,
        positions: Tensor | None,
        documents_BT: Tensor | None,
        prompts_BT: Tensor | None,
        cache: KVCache | None,
    ) -> AttentionInputs:
        cached = 0 if cache is None else cache.length
        given = {"positions_BT": positions, "documents_BT": documents_BT, "prompts_BT": prompts_BT}
        if cached and any(rows is not None for rows in given.values()):
            raise UserError(f"{', '.join(given)}: not supported with a cache that holds tokens; use None")
        if positions is None:
            positions = torch.arange(cached, cached + ids_BT.shape[1], device=ids_BT.device)
        blocks_BT = None if cached else find_blocks(self.config, ids_BT, prompts_BT)
        return build_attention_inputs(self.config, positions, documents_BT, blocks_BT=blocks_BT, cached=cached)

    def embed_media(self, ids_BT: Tensor, media: Media, positions: Tensor | None = None) -> Tensor:
        """The `hidden_BTD` of texts with images or sounds: embeddings, and features at the places of their tokens.

        Features for K of the first blocks, which are added to their outputs, are beside those, (B, T, (1 + K) D).
        A tower without media runs on a blank one if it is trained, since other ranks may have media for it, so that all
        ranks have a gradient of each of its parameters, which is zero here.

        Args:
            positions: as those of `AttentionInputs`; 0, 1, ... if None.

        Raises:
            UserError: if the model has no tower for the media, or the texts do not have a place for each feature.
        """
        for tower, name, given in ((self.vision, "vision", media.grids), (self.audio, "audio", media.sounds)):
            if given and tower is None:
                raise UserError(f"media: the model has no {name} tower; use the folder of a model that has one")
        if positions is None:
            positions = torch.arange(ids_BT.shape[1], device=ids_BT.device)
        if media.is_empty:
            hidden_BTD = self._embed(ids_BT, positions)
        else:
            sources_BT = find_sources(ids_BT, media, self.config) if media.sources_BT is None else media.sources_BT
            hidden_BTD = self.embed_features(ids_BT, positions, sources_BT, self.encode_media(media))
        idle = [] if media.grids else [self.vision]
        for tower in [*idle, *([self.audio] if media.sounds is None else [])]:
            if tower is not None and tower.is_trained:
                hidden_BTD = hidden_BTD + tower.compute_zero()
        return hidden_BTD

    def encode_media(self, media: Media) -> Tensor:
        """The features of media, those of sounds after those of images; (M, (1 + K) D) as of `embed_media`."""
        features = [self.vision(media)] if self.vision is not None and media.grids else []
        if self.audio is not None and media.sounds is not None:
            features.append(self.audio(media.sounds))
        return torch.cat(features)

    def embed_features(self, ids_BT: Tensor, positions: Tensor, sources_BT: Tensor, features_MD: Tensor) -> Tensor:
        """The embeddings (B, T, D) of tokens, and at some places the features of a tower instead.

        Features of several times the width have zeros beside the embeddings.

        Args:
            positions: as those of `AttentionInputs`.
            sources_BT: as in `Media`.
        """
        return self.feature_places(features_MD, self._embed(ids_BT, positions), sources_BT)

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

    def _predict(
        self, hidden_BTD: Tensor, inputs: AttentionInputs, predictions: Sequence[tuple[Tensor, Head]]
    ) -> Iterator[Any]:
        """Run one prediction layer after the other on normalized hidden states; what each head returns."""
        for block, (ids_BT, head) in zip(self.prediction_blocks, predictions, strict=False):
            hidden_BTD = block(torch.cat([self._embed(ids_BT, inputs.positions), hidden_BTD], -1), inputs)
            yield self._apply_head(hidden_BTD, head)

    def _apply_head(self, hidden_BTD: Tensor, head: Head) -> Any:
        hidden_BTD = self.head_input(hidden_BTD)
        if self.config.logit_scale != 1:
            hidden_BTD = hidden_BTD * self.config.logit_scale
        return head(hidden_BTD, self.output_weight, self.output_bias, self.config.final_logit_softcapping)
