"""The formula for operations against a count of the operations that run."""

from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from litgpt.adapt.llama_pro import expand_config
from litgpt.model.config import Config
from litgpt.model.flops import TrainedShares, compute_head_sizes, compute_training_flops, count_keys
from litgpt.model.gpt import GPT, compute_logits
from litgpt.recipe.tuner import LISA, Full, LLaMAPro, LoRA, Tuner
from litgpt.train.run_spec import RunSpec

LLAMA = {"norm_class_name": "RMSNorm", "mlp_class_name": "LLaMAMLP", "intermediate_size": 96, "bias": False}
EXPERTS = {**LLAMA, "mlp_class_name": "LLaMAMoE", "n_expert": 8, "n_expert_per_token": 2, "moe_intermediate_size": 32}
SIZES = {"kv_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 20}
SHAPES: list[dict[str, Any]] = [
    {},
    {"tie_embeddings": True},
    {**LLAMA, "n_query_groups": 2, "head_size": 24},
    {**LLAMA, "latent_attention": {**SIZES, "q_lora_rank": 40}},
    {**LLAMA, "latent_attention": {**SIZES, "q_lora_rank": None}},
    {**EXPERTS, "n_shared_expert": 2},
    {**EXPERTS, "first_k_dense_replace": 1, "shared_expert_size": 40, "shared_expert_gate": True},
    {**EXPERTS, "first_k_dense_replace": 1, "n_prediction_layers": 2},
]


@pytest.mark.parametrize("changes", SHAPES)
def test_formula_equals_the_count(changes: dict[str, Any]) -> None:
    config = Config(**{"n_layer": 2, "n_embd": 64, "n_head": 4, "padded_vocab_size": 128, **changes})
    model = GPT(config)
    grouped = {torch.ops.aten._grouped_mm: lambda x, y, *_, **__: 2 * x[0] * x[1] * y[-1]}
    counter = FlopCounterMode(display=False, custom_mapping=grouped)
    with counter, sdpa_kernel(SDPBackend.MATH):
        ids = torch.zeros(2, 32, dtype=torch.int64)
        outputs = model(ids, predictions=[(ids, compute_logits)] * config.n_prediction_layers)
        sum(logits.sum() for logits in outputs).backward()
    # The counter sees the whole score matrix; the formula counts the half that the causal mask leaves.
    unmasked = 3 * config.n_blocks * config.n_head * sum(compute_head_sizes(config)) * 32 * 64
    assert counter.get_total_flops() == compute_training_flops(config, tokens=64, sequence_length=32) + unmasked


FREEZES: dict[str, Any] = {
    "embedding": lambda name: name == "embedding.weight",
    "lowest layers": lambda name: name.startswith(("embedding", "blocks.0.", "blocks.1.")),
    "a layer in the middle": lambda name: name.startswith("blocks.1."),
    "all but the last norm and the head": lambda name: name.startswith(("embedding", "blocks.")),
    "all but the head": lambda name: name != "head.weight",
    "feed-forward": lambda name: ".mlp." in name,
    "all": lambda _: True,
}


@pytest.mark.parametrize("changes", [LLAMA, {**EXPERTS, "n_shared_expert": 2}], ids=["dense", "experts"])
@pytest.mark.parametrize("frozen", FREEZES)
def test_frozen_weights_have_no_gradients_and_backward_stops_at_the_lowest_trained(
    frozen: str, changes: dict[str, Any]
) -> None:
    config = Config(**{"n_layer": 3, "n_embd": 64, "n_head": 4, "padded_vocab_size": 128, **changes})
    model = GPT(config)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not FREEZES[frozen](name))
    grouped = {torch.ops.aten._grouped_mm: lambda x, y, *_, **__: 2 * x[0] * x[1] * y[-1]}
    counter = FlopCounterMode(display=False, custom_mapping=grouped)
    with counter, sdpa_kernel(SDPBackend.MATH):
        loss = model(torch.zeros(2, 32, dtype=torch.int64)).sum()
        if loss.requires_grad:
            loss.backward()
    shares = TrainedShares.measure(model)
    reached = sum(3 if layer >= shares.lowest else 1 for layer in range(3))
    unmasked = reached * config.n_head * sum(compute_head_sizes(config)) * 32 * 64
    flops = compute_training_flops(config, tokens=64, sequence_length=32, trained=shares)
    assert counter.get_total_flops() == flops + unmasked


def test_operations_of_tuners() -> None:
    config = Config(**{"n_layer": 4, "n_embd": 64, "n_head": 4, "padded_vocab_size": 128, **LLAMA})
    attention, feed_forward, head, keys = 4 * 64 * 64, 3 * 64 * 96, 64 * 128, 4 * 2 * 16 * 16

    def count(tuner: Tuner, model_config: Config = config) -> float:
        spec: Any = RunSpec("finetune", model_config, None, None, None, tuner=tuner)  # type: ignore[arg-type]
        shares = spec.measure_trained_shares()
        return compute_training_flops(model_config, tokens=1, sequence_length=32, trained=shares)

    layer = attention + feed_forward
    assert count(Full()) == 4 * (6 * layer + 6 * keys) + 6 * head
    assert count(LISA(activated_layers=1)) == 4 * (4.5 * layer + 6 * keys) + 6 * head
    assert count(LoRA()) == 4 * (4 * layer + 6 * keys) + 4 * head
    assert count(LoRA(target_regex=r"blocks\.[23]\..*q")) == 2 * (2 + 4) * layer + 2 * (2 + 6) * keys + 4 * head
    pro = LLaMAPro(new_blocks=1)  # after 4 frozen blocks
    assert count(pro, expand_config(config, pro)) == 4 * 2 * (layer + keys) + 6 * (layer + keys) + 4 * head


def test_published_size_of_a_known_model() -> None:
    config = Config.from_name("tiny-llama-1.1b")
    per_token = compute_training_flops(config, tokens=1, sequence_length=2048)
    weights = 1_100_048_384 - 32000 * 2048 - 45 * 2048  # without the looked-up embedding and the norms
    assert per_token == 6 * weights + 6 * 22 * 2048 * 2048


@pytest.mark.parametrize("kind", ["sliding", "chunked"])
def test_keys_that_a_window_leaves(kind: Any) -> None:
    config = Config(
        n_layer=2, n_embd=64, n_head=4, sliding_window_size=8, window_type=kind, sliding_window_indices=[1, 0]
    )
    query, key = torch.arange(64)[:, None], torch.arange(64)[None]
    seen = (key <= query) & ((query - key < 8) if kind == "sliding" else (query // 8 == key // 8))
    # the formula takes positions for a continuum, where of its own key a query sees up to a half less
    assert 0 <= seen.sum().item() / 64 - count_keys(config, 0, 64) <= 0.5
    assert count_keys(config, 1, 64) == 32 and count_keys(config, 0, 4) == 2


def test_only_the_experts_that_a_token_goes_to_are_counted() -> None:
    config = Config.from_name("Qwen3-30B-A3B")
    active = compute_training_flops(config, tokens=1, sequence_length=1) / 6
    assert 2.8e9 < active < 3.4e9  # 3.3 billion with the embedding, as published
