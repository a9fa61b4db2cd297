"""Tables of tensor names: every layout there and back, and what they refuse."""

from typing import Any

import pytest
import torch
from torch import Tensor

from litgpt.errors import UserError
from litgpt.model.config import Config
from litgpt.model.gpt import GPT
from litgpt.model.names import NO_SUCH_PART, NO_WEIGHTS, NameTable, build_name_table, to_hf_names
from litgpt.model.registry import load_litgpt_table
from tests.store.models import to_our_names

SHAPE: dict[str, Any] = {
    "n_layer": 2, "n_embd": 6, "n_head": 4, "n_query_groups": 2, "head_size": 2, "intermediate_size": 5,
    "mlp_class_name": "LLaMAMoE", "n_expert": 3, "n_expert_per_token": 2, "shared_expert_size": 4,
}  # fmt: skip
EXPERTS = "blocks.<i>.mlp.experts"


def config(**changes: Any) -> Config:
    return Config(**{**SHAPE, **changes})


def numbers(*shape: int) -> Tensor:
    return torch.arange(float(torch.Size(shape).numel())).reshape(shape)


def there_and_back(names: NameTable, published: dict[str, Tensor]) -> dict[str, Tensor]:
    """Ours out of the published tensors, which must come back to the bit."""
    ours = to_our_names(names, published, config())
    back = to_hf_names(names, ours, config())
    assert back.keys() == published.keys()
    for name, tensor in published.items():
        assert torch.equal(back[name], tensor) and back[name].is_contiguous(), name
    return ours


def test_a_rule_stands_for_weight_bias_and_bare_tensor() -> None:
    published = {"h.1.q.weight": numbers(8, 6), "h.1.q.bias": numbers(8), "h.0.sinks": numbers(4)}
    names = build_name_table("t", {"h.<i>.q": "blocks.<i>.attention.q", "h.<i>.sinks": "blocks.<i>.attention.sinks"})
    ours = there_and_back(names, published)
    assert set(ours) == {"blocks.1.attention.q.weight", "blocks.1.attention.q.bias", "blocks.0.attention.sinks"}


def test_experts_in_tensors_of_their_own_are_stacked() -> None:
    names = build_name_table(
        "t", {"h.<i>.experts.<e>.w1.weight": f"{EXPERTS}.gate", "h.<i>.experts.<e>.w1.bias": f"{EXPERTS}.gate_bias"}
    )
    published = {f"h.0.experts.{e}.w1.weight": numbers(5, 6) + 100 * e for e in (2, 0, 1)}
    published |= {f"h.0.experts.{e}.w1.bias": numbers(5) + 100 * e for e in range(3)}
    ours = there_and_back(names, published)
    assert ours["blocks.0.mlp.experts.gate"].shape == (3, 5, 6)
    assert torch.equal(ours["blocks.0.mlp.experts.gate"][2], published["h.0.experts.2.w1.weight"])
    assert torch.equal(ours["blocks.0.mlp.experts.gate_bias"][1], published["h.0.experts.1.w1.bias"])


def test_stacked_experts_interleaved_and_transposed() -> None:
    gate_up = [f"{EXPERTS}.gate", f"{EXPERTS}.up"]
    names = build_name_table(
        "t",
        {
            "h.<i>.gate_up": {"interleaved": gate_up, "transposed": True},
            "h.<i>.gate_up_bias": {"interleaved": [f"{name}_bias" for name in gate_up], "transposed": True},
        },
    )
    published = {"h.0.gate_up": numbers(3, 6, 10), "h.0.gate_up_bias": numbers(3, 10)}
    ours = there_and_back(names, published)
    assert torch.equal(ours["blocks.0.mlp.experts.gate"][1], published["h.0.gate_up"][1, :, 0::2].T)
    assert torch.equal(ours["blocks.0.mlp.experts.up"][2], published["h.0.gate_up"][2, :, 1::2].T)
    assert torch.equal(ours["blocks.0.mlp.experts.up_bias"], published["h.0.gate_up_bias"][:, 1::2])


@pytest.mark.parametrize("transposed", [False, True])
def test_stacked_experts_one_below_the_other(transposed: bool) -> None:
    line = {"concat": [f"{EXPERTS}.gate", f"{EXPERTS}.up"], "transposed": transposed}
    published = {"h.0.gate_up": numbers(3, 6, 10) if transposed else numbers(3, 10, 6)}
    ours = there_and_back(build_name_table("t", {"h.<i>.gate_up": line}), published)
    first = published["h.0.gate_up"][1]
    assert torch.equal(ours["blocks.0.mlp.experts.up"][1], first.T[5:] if transposed else first[5:])


def test_fused_and_transposed_per_expert() -> None:
    line = {"concat": [f"{EXPERTS}.gate", f"{EXPERTS}.up"], "transposed": True}
    published = {f"h.0.{e}.gate_up.weight": numbers(6, 10) + 100 * e for e in range(3)}
    ours = there_and_back(build_name_table("t", {"h.<i>.<e>.gate_up.weight": line}), published)
    assert torch.equal(ours["blocks.0.mlp.experts.gate"][2], published["h.0.2.gate_up.weight"].T[:5])


def test_transposed_matrices_but_not_biases() -> None:
    names = build_name_table(
        "t", {"h.<i>.qkv": {"concat": [f"blocks.<i>.attention.{x}" for x in "qkv"], "transposed": True}}
    )
    published = {"h.0.qkv.weight": numbers(6, 16), "h.0.qkv.bias": numbers(16)}
    ours = there_and_back(names, published)
    assert torch.equal(ours["blocks.0.attention.k.weight"], published["h.0.qkv.weight"].T[8:12])
    assert torch.equal(ours["blocks.0.attention.v.bias"], published["h.0.qkv.bias"][12:])


def test_shared_experts_fused_and_a_vector_published_as_a_row() -> None:
    names = build_name_table(
        "t",
        {
            "h.<i>.shared": {"concat": ["blocks.<i>.mlp.shared.gate", "blocks.<i>.mlp.shared.up"]},
            "h.<i>.correction": {"row": ["blocks.<i>.mlp.router.correction"]},
        },
    )
    published = {"h.0.shared.weight": numbers(8, 6), "h.0.correction": numbers(1, 3)}
    ours = there_and_back(names, published)
    assert ours["blocks.0.mlp.shared.up.weight"][0, 0] == 24 and ours["blocks.0.mlp.router.correction"].shape == (3,)


def test_every_head_of_a_group_together() -> None:
    names = build_name_table("t", {"h.<i>.qkv": {"grouped": [f"blocks.<i>.attention.{x}" for x in "qkv"]}})
    published = {"h.0.qkv.weight": numbers(16, 6)}
    ours = there_and_back(names, published)
    assert torch.equal(ours["blocks.0.attention.k.weight"], published["h.0.qkv.weight"][[4, 5, 12, 13]])


def test_a_tensor_without_a_rule_is_refused_both_ways() -> None:
    names = build_name_table("t", {"norm": "norm", "h.<i>.q": "blocks.<i>.attention.q"})
    assert names.map_hf_name("norm.weight", config()) is not None
    assert names.map_hf_name("h.0.q.scale", config()) is None
    with pytest.raises(UserError, match=r"blocks\.0\.attention\.q\.weight\.extra: t has no name"):
        names.map_names(["norm.weight", "blocks.0.attention.q.weight.extra"], config())
    fused = build_name_table("t", {"qkv": {"concat": ["q", "k"]}})
    with pytest.raises(UserError, match=r"k\.weight: missing, but t stores it in one tensor with others"):
        fused.map_names(["q.weight"], config())


@pytest.mark.parametrize("shape", [(9, 6), (3,), ()])
def test_a_tensor_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    names = build_name_table(
        "t", {"h.<i>.gate_up": {"interleaved": [f"{EXPERTS}.gate", f"{EXPERTS}.up"], "transposed": True}}
    )
    with pytest.raises(UserError, match=r"h\.0\.gate_up: "):
        to_our_names(names, {"h.0.gate_up": torch.zeros(shape)}, config())


def test_rules_hold_for_the_shapes_they_name() -> None:
    names = build_name_table("t", {"w": {"rename": ["up"], "when": {"mlp_class_name": ["GptNeoxMLP"]}}, "w3": "up"})
    assert names.map_names(["up.weight"], config())[0].hf_name == "w3.weight"
    plain = config(mlp_class_name="GptNeoxMLP", n_expert=0)
    assert names.map_names(["up.weight"], plain)[0].hf_name == "w.weight"


def test_parts_that_the_model_has_not_are_left_out_and_counted() -> None:
    unread = [r"model\.layers\.<beyond>\..*", r"vision\..*"]
    names = build_name_table("t", {"model.layers.<i>.q": "blocks.<i>.attention.q"}, [r".*\.inv_freq"], unread=unread)
    published = ["model.layers.1.q.weight", "model.layers.2.q.weight", "vision.a", "model.layers.0.inv_freq"]
    reasons = [names.get_skip_reason(name, config()) for name in published]
    assert reasons == ["", NO_SUCH_PART, NO_SUCH_PART, NO_WEIGHTS]
    assert names.map_hf_name(published[0], config()) is not None


def test_names_may_start_otherwise() -> None:
    lines = {"transformer.h.<i>.q": "blocks.<i>.attention.q", "lm_head": "head"}
    names = build_name_table("t", lines, [r"transformer\.h\.\d+\.mask"], prefix="transformer.", starts={"text.": ""})
    published = {
        "h.1.q.weight": "blocks.1.attention.q.weight",
        "lm_head.weight": "head.weight",
        "text.transformer.h.0.q.weight": "blocks.0.attention.q.weight",
    }
    for hf_name, name in published.items():
        mapping = names.map_hf_name(hf_name, config())
        assert mapping is not None and mapping.hf_name == hf_name and mapping.names == (name,)
    assert names.get_skip_reason("h.1.mask", config()) == NO_WEIGHTS
    assert names.map_names(["head.weight"], config())[0].hf_name == "lm_head.weight"


def test_litgpt_names_of_every_part_of_a_model_with_experts() -> None:
    latent = {"q_lora_rank": 4, "kv_lora_rank": 4, "qk_rope_head_dim": 2, "qk_nope_head_dim": 2, "v_head_dim": 2}
    for more in (
        {},
        {"latent_attention": latent, "n_query_groups": 4, "first_k_dense_replace": 1, "router_correction": True},
        {"bias": True},
    ):
        shape = config(**more, norm_class_name="RMSNorm", padded_vocab_size=16)
        ours = {key: torch.randn_like(one) for key, one in GPT(shape).named_parameters()}
        published = to_hf_names(load_litgpt_table(), ours, shape)
        assert all(key.startswith(("transformer.", "lm_head.")) for key in published)
        assert f"transformer.h.1.mlp.experts.2.fc_1.{'bias' if 'bias' in more else 'weight'}" in published
        back = to_our_names(load_litgpt_table(), published, shape)
        assert back.keys() == ours.keys() and all(torch.equal(back[key], ours[key]) for key in ours)
