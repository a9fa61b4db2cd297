"""Count the weights of a model that tokens, patches of images, or frames of sounds are multiplied with."""

from litgpt.model.audio_config import AudioShape
from litgpt.model.config import Config
from litgpt.model.tower_config import BlockShape, TowerShape


def count_head_weights(config: Config) -> int:
    """Number of weights of the head."""
    assert config.padded_vocab_size is not None
    return config.n_embd * (1 if config.output == "score" else config.padded_vocab_size)


def count_attention_weights(config: Config) -> int:
    """Number of weights of a layer's attention."""
    assert config.head_size is not None and config.n_query_groups is not None
    if config.latent_attention is None:
        return 2 * (config.n_head + config.n_query_groups) * config.head_size * config.n_embd
    sizes = config.latent_attention
    width, latent, q_rank, value = config.n_embd, sizes["kv_lora_rank"], sizes["q_lora_rank"], sizes["v_head_dim"]
    query = config.n_head * (sizes["qk_nope_head_dim"] + sizes["qk_rope_head_dim"])
    queries = width * query if q_rank is None else q_rank * (width + query)
    kv_up = latent * config.n_head * (sizes["qk_nope_head_dim"] + value)
    return queries + width * (latent + sizes["qk_rope_head_dim"]) + kv_up + config.n_head * value * width


def count_feed_forward_weights(config: Config, layer: int) -> int:
    """Number of weights of a layer's feed-forward that a token is multiplied with."""
    assert config.intermediate_size is not None
    if not config.has_experts(layer):
        return (2 if config.mlp_class_name == "GptNeoxMLP" else 3) * config.n_embd * config.intermediate_size
    gate = int(config.shared_size > 0 and config.shared_expert_gate)
    inner = config.n_expert_per_token * config.expert_size + config.shared_size
    return config.n_embd * (3 * inner + config.n_expert + gate)


def count_block_weights(shape: BlockShape) -> int:
    """Number of weights of a block of a tower."""
    matrices = 3 if shape.mlp_form == "gated" else 2
    return 4 * shape.width**2 + matrices * shape.width * shape.mlp_size


def count_projector_weights(shape: TowerShape, width: int) -> tuple[int, int]:
    """Number of weights, in all projectors to a decoder of this width, of their first matrices, and of the others."""
    block, hidden, copies = shape.width * shape.merge**2, shape.projector_hidden, 1 + len(shape.deep_layers or [])
    merged = {"concat": block, "convolution": width}.get(shape.projector_merge, shape.width)
    matrices = [merged * (hidden or width), (hidden or 0) * width]
    if shape.projector_form == "triple":
        matrices.insert(1, (hidden or 0) ** 2)
    if shape.projector_form == "gated":
        matrices = [merged * width, 3 * (hidden or 0) * width]
    if shape.projector_merge in ("matrix", "convolution"):
        matrices = [block * merged, *matrices]
    return copies * matrices[0], copies * sum(matrices[1:])


def count_tower_weights(config: Config) -> int:
    """Number of weights of the blocks and projectors of the towers that are multiplied with; 0 without one."""
    total = 0
    if config.vision is not None:
        shape = TowerShape.from_values(config.vision)
        total += shape.blocks_run * count_block_weights(shape) + sum(count_projector_weights(shape, config.n_embd))
    if config.audio is not None:
        audio = AudioShape.from_values(config.audio)
        total += audio.layers * count_block_weights(audio) + audio.width * config.n_embd
    return total


def count_tower_layers(config: Config) -> int:
    """The number of layers of the decoder that have as many weights as the towers; 0 without one."""
    layers = (count_attention_weights(config) + count_feed_forward_weights(config, i) for i in range(config.n_layer))
    return round(count_tower_weights(config) * config.n_layer / sum(layers))
