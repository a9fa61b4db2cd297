"""Estimate the floating-point operations of training."""

from dataclasses import dataclass

from litgpt.model.config import Config
from litgpt.model.gpt import GPT
from litgpt.model.tower_flops import EncodedMedia, TowerShares, compute_media_flops, compute_trained_share
from litgpt.model.weight_counts import count_attention_weights, count_feed_forward_weights, count_head_weights


@dataclass(frozen=True)
class TrainedShares:
    """The shares of a model's weights that are trained.

    Attributes:
        attention, feed_forward: of each layer, and of each prediction layer if they are trained.
        head: of the output matrix; with tied embeddings, of the embedding.
        lowest: the first layer that the backward pass reaches; the number of layers if it reaches none.
        hidden: whether the backward pass reaches the input of the head.
        vision, audio: of the towers; None for one that the model does not have.
    """

    attention: tuple[float, ...]
    feed_forward: tuple[float, ...]
    head: float
    lowest: int
    hidden: bool
    vision: TowerShares | None = None
    audio: TowerShares | None = None

    @classmethod
    def measure(cls, model: GPT, *, adapted: bool = False, active: float = 1.0) -> "TrainedShares":
        """Measure a whole model, which may be on the meta device.

        Args:
            adapted: what requires gradients was added to the model, whose own weights are frozen.
            active: share of the blocks that are trained at a time.
        """
        factor = 0.0 if adapted else active
        layers, trained = model.config.n_layer, {name for name, p in model.named_parameters() if p.requires_grad}
        predictions = model.prediction_blocks if model.trains_predictions else []
        blocks = [*((block, factor) for block in model.local_blocks[:layers]), *((block, 1.0) for block in predictions)]
        return cls(
            tuple(share * compute_trained_share(block.attention) for block, share in blocks),
            tuple(share * compute_trained_share(block.mlp) for block, share in blocks),
            0.0 if adapted else float(model.output_weight.requires_grad),
            min((find_layer(name, layers) for name in trained), default=layers),
            any(not name.startswith(("head.", "score.")) for name in trained),
            *(TowerShares.measure(tower, 0.0 if adapted else 1.0) for tower in (model.vision, model.audio)),
        )


def find_layer(name: str, layers: int) -> int:
    """The layer of a parameter: 0 for embeddings and towers, `layers` for the last norm and the head."""
    part, _, rest = name.partition(".")
    is_before = "embedding" in part or part in ("vision", "audio")
    return int(rest.partition(".")[0]) if part == "blocks" else 0 if is_before else layers


def compute_training_flops(
    config: Config,
    *,
    tokens: int,
    sequence_length: int,
    trained: TrainedShares | None = None,
    media: EncodedMedia | None = None,
) -> float:
    """FLOPs of forward and backward for `tokens` tokens in sequences of `sequence_length`.

    Per token, for every multiplied weight (not the embedding, but the head even if it is tied; only the experts of a
    token): 2 in forward, 2 for the gradient of its input in all layers from the lowest one that is trained, and 2 for
    its own gradient if it is trained, so 6 if all are. For attention, 12 * heads * head size * keys in each layer
    (Chowdhery et al. 2022, "PaLM", appendix B), a third of it below the lowest trained layer, with the average number
    of keys per query: half of the sequence, less with a window. Each prediction layer, if they are trained, has a
    projection of 2 width^2 weights, and the head once more. Biases, norms, rotation, softmax and adapters are not
    counted, nor is what is recomputed in backward.

    Args:
        trained: what is trained; None for all weights of a model without a tower.
        media: what the towers encode for the tokens; None for nothing.
    """
    trained = trained or TrainedShares((1.0,) * config.n_blocks, (1.0,) * config.n_blocks, 1.0, 0, True)
    layers = len(trained.attention)
    heads = 1 + layers - config.n_layer
    total = (2 + 2 * trained.hidden + 2 * trained.head) * heads * count_head_weights(config)
    for layer in range(layers):
        passes = 2 if layer >= trained.lowest else 1  # a gradient of the input costs as much as the output
        projection = 2 * config.n_embd**2 * (layer >= config.n_layer)
        total += (2 * passes + 2 * trained.attention[layer]) * (count_attention_weights(config) + projection)
        total += (2 * passes + 2 * trained.feed_forward[layer]) * count_feed_forward_weights(config, layer)
        keys = count_keys(config, layer, sequence_length)
        total += 2 * (2 * passes - 1) * config.n_head * sum(compute_head_sizes(config)) * keys
    return tokens * total + (0 if media is None else compute_media_flops(config, media, trained.vision, trained.audio))


def compute_head_sizes(config: Config) -> tuple[int, int]:
    """The head sizes of queries and keys, and of values."""
    assert config.head_size is not None
    if config.latent_attention is None:
        return config.head_size, config.head_size
    sizes = config.latent_attention
    return sizes["qk_nope_head_dim"] + sizes["qk_rope_head_dim"], sizes["v_head_dim"]


def count_keys(config: Config, layer: int, sequence_length: int) -> float:
    """Average number of keys per query of a layer."""
    if not config.is_local(layer):
        return sequence_length / 2
    assert config.sliding_window_size is not None
    window = min(config.sliding_window_size, sequence_length)
    return window / 2 if config.window_type == "chunked" else window - window**2 / (2 * sequence_length)
