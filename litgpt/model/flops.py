"""Floating-point operations of training, by formula."""

from litgpt.model.config import Config


def training_flops(config: Config, *, tokens: int, sequence_length: int, frozen: bool = False) -> float:
    """Operations of forward and backward over `tokens` tokens in sequences of `sequence_length`.

    Per token: 6 for every weight that is multiplied (2 forward, 4 backward; the embedding is looked up, not
    multiplied, the head is multiplied even where it shares the embedding's weight; of experts, those that a token goes
    to), and for scores and values 12 * heads * head size * keys in each layer (Chowdhery et al. 2022, "PaLM", appendix
    B), with the keys that a query sees on average: half of the sequence, less where the layer has a window. Biases,
    norms, rotation and softmax are left out, as there.

    Args:
        frozen: the weights get no gradients, as beside an adapter: 4 for each; the adapter itself is left out.
    """
    attention = (
        6
        * config.n_head
        * sum(head_sizes(config))
        * sum(keys_seen(config, layer, sequence_length) for layer in range(config.n_layer))
    )
    return float(tokens) * ((4 if frozen else 6) * multiplied_weights(config) + attention)


def head_sizes(config: Config) -> tuple[int, int]:
    """How many numbers of a head are multiplied for a score and for a value."""
    assert config.head_size is not None
    if config.latent_attention is None:
        return config.head_size, config.head_size
    sizes = config.latent_attention
    return sizes["qk_nope_head_dim"] + sizes["qk_rope_head_dim"], sizes["v_head_dim"]


def keys_seen(config: Config, layer: int, sequence_length: int) -> float:
    """Keys that a query of the layer sees on average."""
    if not config.is_local(layer):
        return sequence_length / 2
    assert config.sliding_window_size is not None
    window = min(config.sliding_window_size, sequence_length)
    return window / 2 if config.window_type == "chunked" else window - window**2 / (2 * sequence_length)


def multiplied_weights(config: Config) -> int:
    """How many weights every token is multiplied with: those of all linear layers, the head included."""
    assert config.padded_vocab_size is not None
    layers = sum(attention_weights(config) + feed_forward_weights(config, layer) for layer in range(config.n_layer))
    return layers + config.n_embd * config.padded_vocab_size


def attention_weights(config: Config) -> int:
    """The weights of one layer's attention."""
    assert config.head_size is not None and config.n_query_groups is not None
    if config.latent_attention is None:
        return 2 * (config.n_head + config.n_query_groups) * config.head_size * config.n_embd
    sizes = config.latent_attention
    width, latent, rank, value = config.n_embd, sizes["kv_lora_rank"], sizes["q_lora_rank"], sizes["v_head_dim"]
    query = config.n_head * (sizes["qk_nope_head_dim"] + sizes["qk_rope_head_dim"])
    queries = width * query if rank is None else rank * (width + query)
    kv_up = latent * config.n_head * (sizes["qk_nope_head_dim"] + value)
    return queries + width * (latent + sizes["qk_rope_head_dim"]) + kv_up + config.n_head * value * width


def feed_forward_weights(config: Config, layer: int) -> int:
    """The weights of one layer's feed-forward part that a token meets."""
    assert config.intermediate_size is not None
    if not config.has_experts(layer):
        return (2 if config.mlp_class_name == "GptNeoxMLP" else 3) * config.n_embd * config.intermediate_size
    gate = int(config.shared_size > 0 and config.shared_expert_gate)
    inner = config.n_expert_per_token * config.expert_size + config.shared_size
    return config.n_embd * (3 * inner + config.n_expert + gate)
