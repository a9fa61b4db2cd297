"""The shape of a model: defaults, what is refused and how it says so."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from litgpt.errors import UserError
from litgpt.model.config import Config

LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
LONG = {"short_factor": [1.0] * 16, "long_factor": [2.0] * 16, "original_max_seq_len": 64}
EXPERTS: dict[str, Any] = {"mlp_class_name": "LLaMAMoE", "intermediate_size": 8, "n_expert": 8, "n_expert_per_token": 2}


def test_derived_sizes_follow_from_the_others() -> None:
    config = Config(n_embd=64, n_head=4, vocab_size=1000)
    assert (config.head_size, config.n_query_groups, config.intermediate_size) == (16, 4, 256)
    assert config.padded_vocab_size == 1024
    assert Config(n_embd=64, n_head=4, padded_vocab_size=512).vocab_size == 512


def test_numbers_written_as_yaml_text_are_read() -> None:
    config = Config(n_layer="1e1", norm_eps="1e-6", rope_base=500000.0)
    assert (config.n_layer, config.norm_eps, config.rope_base) == (10, 1e-6, 500000)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"n_lyer": 3}, ["n_lyer", "n_layer"]),
        ({"n_layer": "six"}, ["n_layer", "six", "int"]),
        ({"n_layer": True}, ["n_layer", "True"]),
        ({"n_layer": 0}, ["n_layer", "0", "1 to"]),
        ({"n_layer": -1}, ["n_layer", "-1"]),
        ({"n_embd": 10**12}, ["n_embd", str(10**12)]),
        ({"n_layer": None}, ["n_layer", "None"]),
        ({"norm_eps": float("nan")}, ["norm_eps", "nan"]),
        ({"rope_base": float("inf")}, ["rope_base", "inf"]),
        ({"n_embd": 65, "n_head": 4}, ["n_embd", "65", "n_head 4", "64"]),
        ({"n_head": 4, "n_query_groups": 3}, ["n_query_groups", "3"]),
        ({"n_embd": 20, "n_head": 4, "rotary_percentage": 1.0}, ["rotary_percentage", "5"]),
        ({"rotary_percentage": 1.5}, ["rotary_percentage", "1.5"]),
        ({"norm_class_name": "BatchNorm"}, ["norm_class_name", "BatchNorm", "RMSNorm"]),
        ({"mlp_class_name": "LLaMAMLP"}, ["intermediate_size", "LLaMAMLP"]),
        ({"rope_adjustments": {"factor": 2.0, "beta_fast": 32}}, ["rope_adjustments", "beta_fast"]),
        ({"rope_adjustments": {"factor": "much"}}, ["rope_adjustments: factor", "much"]),
        ({"rope_adjustments": [8.0]}, ["rope_adjustments", "8.0"]),
        ({"shared_attention_norm": True, "parallel_residual": False}, ["shared_attention_norm"]),
        ({"tie_embeddings": True, "lm_head_bias": True}, ["lm_head_bias"]),
        ({"dropout": 1.0}, ["dropout", "1.0"]),
        ({"hf_config": "meta"}, ["hf_config", "meta"]),
    ],
)
def test_impossible_shapes_answer_in_one_line(values: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        Config(**values)
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"sliding_window_indices": [1] * 16}, ["sliding_window_indices", "sliding_window_size"]),
        ({"sliding_window_size": 8, "sliding_window_indices": [1, 0]}, ["one 0 or 1 for each of 16 layers"]),
        ({"rope_layers": [2] * 16}, ["rope_layers", "one 0 or 1"]),
        ({"rope_indices": [1] * 16}, ["rope_indices", "rope_local_base_freq"]),
        ({"attention_logit_softcapping": -1.0}, ["attention_logit_softcapping", "is not positive"]),
        ({"query_temperature": {"scale": 1.0}}, ["query_temperature", "floor_scale"]),
        ({"latent_attention": {"q_lora_rank": 8}}, ["latent_attention", "kv_lora_rank"]),
        ({"latent_attention": {**LATENT, "v_head_dim": 0}}, ["v_head_dim: 0", "positive integer"]),
        ({"latent_attention": LATENT, "n_query_groups": 8}, ["n_query_groups", "use 32"]),
        ({"n_expert": 8}, ["n_expert", "LLaMAMoE"]),
        ({"mlp_class_name": "LLaMAMoE", "intermediate_size": 8}, ["n_expert", "e.g. 8"]),
        ({**EXPERTS, "n_expert_per_token": 9}, ["n_expert_per_token", "9 of 8"]),
        ({**EXPERTS, "n_expert_groups": 3}, ["n_expert_groups", "3 does not divide"]),
        ({**EXPERTS, "n_expert_groups": 4, "n_topk_groups": 5}, ["n_topk_groups", "5 of 4"]),
        ({**EXPERTS, "n_expert_groups": 8, "n_topk_groups": 1}, ["n_expert_per_token", "out of 1 of 8 groups"]),
        ({"rope_adjustments": {"factor": 2.0, "short_factor": [1.0]}}, ["rope_adjustments", "longrope"]),
        ({"rope_adjustments": {"factor": [-1.0]}}, ["rope_adjustments", "factor"]),
        ({"rope_adjustments": {**LONG, "short_factor": [1.0]}}, ["short_factor has 1 numbers for 16 pairs"]),
        ({"rope_adjustments": {**LONG, "short_factor": 1.0}}, ["short_factor"]),
    ],
)
def test_what_does_not_fit_together_is_refused_by_field(values: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        Config(**values)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_layers_are_told_apart_by_lists_of_marks() -> None:
    marks = {"sliding_window_indices": [1, 0, 1], "rope_indices": [1, 0, 1, 1], "rope_layers": [1, 1, 0]}
    config = Config(n_layer=3, sliding_window_size=8, rope_local_base_freq=100.0, **marks)
    assert [config.is_local(layer) for layer in range(3)] == [True, False, True]
    assert [config.rope_of(layer) for layer in range(3)] == ["local", "global", None]
    assert config.rope_indices == [1, 0, 1]  # longer lists are cut, as LitGPT does
    mixed = Config(n_layer=3, **EXPERTS, first_k_dense_replace=1, moe_layers=[1, 1, 0])
    assert [mixed.has_experts(layer) for layer in range(3)] == [False, True, False]


JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.lists(st.integers(), max_size=2),
    st.dictionaries(st.text(max_size=3), st.floats(), max_size=2),
)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from([entry.name for entry in fields(Config)]), JUNK, max_size=4))
def test_any_junk_is_a_shape_or_a_user_error(values: dict[str, Any]) -> None:
    try:
        assert Config(**Config(**values).to_dict()) == Config(**values)
    except UserError as error:
        assert "\n" not in str(error)


def test_file_round_trip_and_overrides(tmp_path: Path) -> None:
    config = Config(name="mine", n_embd=64, n_head=4, tie_embeddings=True)
    (tmp_path / "model_config.yaml").write_text(yaml.safe_dump(config.to_dict()))
    assert Config.from_file(tmp_path / "model_config.yaml") == config
    assert Config.from_checkpoint(tmp_path, n_layer=2).n_layer == 2


@pytest.mark.parametrize("text", ["n_layer: [", "- 1", "", "\x00", "n_layer: 1e400", "[" * 1200])
def test_malformed_files_answer_in_one_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "model_config.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        Config.from_file(path)
    assert "\n" not in str(caught.value)


def test_missing_and_binary_files_answer_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00\x81")
    for name in ("nothing", "binary", "."):
        with pytest.raises(UserError):
            Config.from_file(tmp_path / name)


def test_derived_sizes_follow_when_a_named_shape_is_changed() -> None:
    shrunk = Config.from_name("pythia-14m", n_embd=32)
    assert (shrunk.head_size, shrunk.n_query_groups, shrunk.intermediate_size) == (8, 4, 128)
    assert Config.from_name("Llama-3.2-1B", n_layer=2).n_query_groups == 8  # not derived, so it stays
