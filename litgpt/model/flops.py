"""Floating-point operations of training, by formula."""

from litgpt.model.config import Config


def training_flops(config: Config, *, tokens: int, sequence_length: int) -> float:
    """Operations of forward and backward over `tokens` tokens in sequences of `sequence_length`.

    Per token: 6 for every weight that is multiplied (2 forward, 4 backward; the embedding is looked up, not
    multiplied, the head is multiplied even where it shares the embedding's weight), and for scores and values
    12 * layers * heads * head size * length (Chowdhery et al. 2022, "PaLM", appendix B), halved because the causal mask
    leaves half of them. Biases, norms, rotation and softmax are left out, as there.
    """
    assert config.head_size is not None
    attention = 6 * config.n_layer * config.n_head * config.head_size * sequence_length
    return float(tokens) * (6 * multiplied_weights(config) + attention)


def multiplied_weights(config: Config) -> int:
    """How many weights every token is multiplied with: those of all linear layers, the head included."""
    assert config.head_size is not None and config.n_query_groups is not None
    assert config.intermediate_size is not None and config.padded_vocab_size is not None
    attention = 2 * (config.n_head + config.n_query_groups) * config.head_size * config.n_embd
    mlp = (2 if config.mlp_class_name == "GptNeoxMLP" else 3) * config.n_embd * config.intermediate_size
    return config.n_layer * (attention + mlp) + config.n_embd * config.padded_vocab_size
