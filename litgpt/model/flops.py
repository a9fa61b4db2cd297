"""Estimate the floating-point operations of training."""

from litgpt.model.config import Config


def compute_training_flops(config: Config, *, tokens: int, sequence_length: int, frozen: bool = False) -> float:
    """FLOPs of forward and backward for `tokens` tokens in sequences of `sequence_length`.

    Per token: 6 for every multiplied weight (2 forward, 4 backward; not the embedding, but the head even if it is tied;
    only the experts of a token), and for attention 12 * heads * head size * keys in each layer (Chowdhery et al. 2022,
    "PaLM", appendix B), with the average number of keys per query: half of the sequence, less with a window. Biases,
    norms, rotation and softmax are not counted.

    Args:
        frozen: the weights have no gradients, as with an adapter: 4 for each; the adapter itself is not counted.
    """
    keys = sum(count_keys(config, layer, sequence_length) for layer in range(config.n_layer))
    attention = 6 * config.n_head * sum(compute_head_sizes(config)) * keys
    return float(tokens) * ((4 if frozen else 6) * count_multiplied_weights(config) + attention)


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


def count_multiplied_weights(config: Config) -> int:
    """Number of weights that a token is multiplied with: those of all linear layers and the head."""
    assert config.padded_vocab_size is not None
    feed_forward = sum(count_feed_forward_weights(config, layer) for layer in range(config.n_layer))
    return config.n_layer * count_attention_weights(config) + feed_forward + config.n_embd * config.padded_vocab_size


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
