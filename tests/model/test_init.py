"""First values of parameters: right for every kind, a function of seed and name alone."""

from typing import Any

import pytest
import torch

from litgpt.model.config import Config
from litgpt.model.gpt import GPT
from litgpt.model.init import draw_init_value, initialize

SHAPE: dict[str, Any] = {
    "n_layer": 2, "n_embd": 64, "n_head": 4, "padded_vocab_size": 128, "block_size": 64, "intermediate_size": 96,
    "norm_class_name": "RMSNorm", "mlp_class_name": "LLaMAMoE", "bias": False, "parallel_residual": False,
    "n_expert": 8, "n_expert_per_token": 2, "first_k_dense_replace": 1, "n_shared_expert": 1,
    "shared_expert_gate": True, "expert_bias": True, "router_bias": True, "router_correction": True, "attn_bias": True,
    "attention_sinks": True, "norm_qk": True, "position_embedding": "learned", "post_mlp_norm": True,
}  # fmt: skip
SIZES = {"q_lora_rank": 32, "kv_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16}
LATENT = {"latent_attention": SIZES, "attention_sinks": False, "norm_qk": False}
PLAIN, ADDED = (2 / (5 * 64)) ** 0.5, 1 / (64**0.5 * 2)


@pytest.mark.parametrize("changes", [{}, LATENT, {"norm_class_name": "OffsetRMSNorm"}])
def test_every_kind_of_parameter(changes: dict[str, Any]) -> None:
    model = GPT(Config(**{**SHAPE, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7)
    initialize(model, 3)
    for name, parameter in model.named_parameters():
        *_, owner, kind = name.split(".")
        if kind.endswith("bias") or kind in ("correction", "sinks"):
            assert not parameter.any(), name
        elif owner.startswith("norm"):
            assert (parameter == (0 if "Offset" in model.config.norm_class_name else 1)).all(), name
        else:
            expected_std = ADDED if "down" in (owner, kind) or owner == "out" else PLAIN
            assert abs(parameter.std().item() / expected_std - 1) < 0.2, name  # 64 numbers at least
            assert abs(parameter.mean().item()) < expected_std / 2, name


def test_experts_differ() -> None:
    model = GPT(Config(**SHAPE))
    initialize(model, 3)
    experts = model.blocks[1].mlp.experts
    for weight in (experts.gate, experts.up, experts.down):
        assert len(weight.flatten(1).unique(dim=0)) == 8
    assert not torch.equal(experts.gate, experts.up)


def test_values_depend_on_seed_and_name_alone() -> None:
    config = Config(**SHAPE)
    name, shape = "blocks.1.mlp.experts.gate", (8, 96, 64)
    assert torch.equal(draw_init_value(config, name, shape, 3), draw_init_value(config, name, shape, 3))
    for other, seed in ((name, 4), ("blocks.1.mlp.experts.up", 3), ("blocks.0.mlp.experts.gate", 3)):
        assert not torch.equal(draw_init_value(config, name, shape, 3), draw_init_value(config, other, shape, seed))


def test_norms_of_a_tower_are_not_those_of_the_decoder() -> None:
    vision: dict[str, Any] = {"width": 16, "layers": 1, "heads": 2, "mlp_size": 16, "blocks_run": 1, "patch": 4}
    vision |= {
        "image_token": 9,
        "projector_norm": "offset_rms",
        "projector_norm_at": "block",
        "projector_merge": "mean",
    }
    sizes: dict[str, Any] = {
        "n_layer": 1,
        "n_embd": 16,
        "n_head": 2,
        "padded_vocab_size": 16,
        "norm_class_name": "OffsetRMSNorm",
    }
    model = GPT(Config(**sizes, block_size=32, vision=vision))
    initialize(model, 0)
    norms = {name: value.unique().tolist() for name, value in model.named_parameters() if name.endswith("_1.weight")}
    assert norms["blocks.0.norm_1.weight"] == [0.0] and norms["vision.blocks.0.norm_1.weight"] == [1.0]
    assert model.get_parameter("vision.projector.norm.weight").unique().tolist() == [0.0]
