"""Named shapes and the folders they are read from."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from litgpt.data.render.number_words import spell_number
from litgpt.errors import UserError
from litgpt.model.config import Config
from litgpt.model.gpt import GPT
from litgpt.model.names import to_hf_names
from litgpt.model.registry import find_family, list_model_names, load_families, load_litgpt_table
from tests.store.models import to_our_names

PARAMETERS = {
    "pythia-14m": 14_067_712,
    "pythia-160m": 162_322_944,
    "pythia-6.9b": 6_857_302_016,
    "tiny-llama-1.1b": 1_100_048_384,
    "Llama-2-7b-hf": 6_738_415_616,
    "Llama-3-8B": 8_030_261_248,
    "Llama-3.2-1B": 1_235_814_400,
    "Mistral-7B-v0.3": 7_248_023_552,
    "Qwen2.5-0.5B": 494_032_768,
    "Qwen2.5-7B": 7_615_616_512,
    "Qwen3-0.6B": 596_049_920,
    "Qwen3-8B": 8_190_735_360,
    "Gemma-2b": 2_506_172_416,
    "Gemma-7b": 8_537_680_896,
    "SmolLM2-135M": 134_515_008,
    "stories15M": 15_191_712,
    "Mistral-7B-v0.1": 7_241_732_096,
    "Mistral-Nemo-Base-2407": 12_247_782_400,
    "Gemma-2-2b": 2_614_341_888,
    "Gemma-2-27b": 27_227_128_320,
    "Gemma-3-270m": 268_098_176,
    "Gemma-3-1b-it": 999_885_952,
    "gpt2": 124_439_808,
    "gpt2-xl": 1_557_611_200,
    "phi-2": 2_779_683_840,
    "Phi-3-mini-4k-instruct": 3_821_079_552,
    "phi-4": 14_659_507_200,
    "Phi-4-mini-instruct": 3_836_021_760,
    "OLMo-1B-hf": 1_176_764_416,
    "OLMo-7B-hf": 6_888_095_744,
    "OLMo-2-0425-1B": 1_484_916_736,
    "OLMo-2-1124-7B": 7_298_617_344,
    "Olmo-3-1025-7B": 7_298_011_136,
    "SmolLM3-3B": 3_075_098_624,
    "granite-3.1-2b-base": 2_533_531_648,
    "aya-expanse-8b": 8_028_033_024,
    "glm-4-9b-hf": 9_399_951_360,
    "starcoder2-3b": 3_030_371_328,
    "starcoder2-7b": 7_173_923_840,
    "stablelm-3b-4e1t": 2_795_443_200,
    "Seed-OSS-36B-Base": 36_151_104_512,
    "ERNIE-4.5-0.3B-PT": 360_748_032,
}


def meta(config: Config) -> GPT:
    with torch.device("meta"):
        return GPT(config)


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts_are_the_published_ones(name: str) -> None:
    assert sum(parameter.numel() for parameter in meta(Config.from_name(name)).parameters()) == PARAMETERS[name]


def test_every_named_shape_builds_and_its_family_expresses_it() -> None:
    assert len(list_model_names()) == len(set(list_model_names())) > 150
    built = set()
    for name in list_model_names():
        config = Config.from_name(name)
        family = find_family(config)
        assert family is not None and name in family.shapes, name
        assert Config(**config.to_dict()) == config
        shape = json.dumps({**config.to_dict(), "name": "", "hf_config": {}, "n_layer": 1})
        if shape not in built:
            meta(Config(**json.loads(shape)))
        built.add(shape)


def test_names_of_the_hub_find_the_same_shape() -> None:
    for name in ("Llama-3-8B", "Meta-Llama-3-8B", "meta-llama/Meta-Llama-3-8B"):
        assert Config.from_name(name).name == "Llama-3-8B"
    assert Config.from_name("pythia-160m").hf_config == {"org": "EleutherAI", "name": "pythia-160m"}
    with pytest.raises(UserError, match="pythia-14m"):
        Config.from_name("EleutherAI/pythia-14")
    with pytest.raises(UserError, match="not known"):
        Config.from_name("")


@pytest.mark.parametrize(
    ("name", "facts"),
    [
        ("pythia-14m", {"block_size": 512, "n_layer": 6, "n_embd": 128, "n_head": 4, "padded_vocab_size": 50304}),
        ("pythia-14m", {"vocab_size": 50254, "rotary_percentage": 0.25, "parallel_residual": True, "bias": True}),
        ("tiny-llama-1.1b", {"n_query_groups": 4, "intermediate_size": 5632, "norm_eps": 1e-5, "bias": False}),
        (
            "Llama-3.1-8B",
            {"rope_base": 500000, "block_size": 131072, "vocab_size": 128000, "padded_vocab_size": 128256},
        ),
        ("LLaMA-2-7B-32K", {"rope_condense_ratio": 8}),
        ("Qwen2.5-7B", {"attn_bias": True, "n_query_groups": 4, "tie_embeddings": False, "norm_eps": 1e-6}),
        ("Qwen3-0.6B", {"norm_qk": True, "head_size": 128, "tie_embeddings": True, "block_size": 40960}),
        ("Gemma-7b", {"head_size": 256, "norm_eps": 1e-6, "norm_class_name": "OffsetRMSNorm", "vocab_size": 256000}),
        ("stories15M", {"n_layer": 6, "n_embd": 288, "n_head": 6, "intermediate_size": 768, "block_size": 256}),
    ],
)
def test_facts_of_named_shapes(name: str, facts: dict[str, Any]) -> None:
    shape = Config.from_name(name).to_dict()
    assert {key: shape[key] for key in facts} == facts


LITGPT_SHAPES = (Path(__file__).parent / "litgpt_shapes.txt").read_text().splitlines()
LITGPT_FIELDS = LITGPT_SHAPES[0].split(": ")[1].split("; ")[0].split(", ")
# Where LitGPT's form and the published config.json differ, the latter is right.
AS_PUBLISHED = {
    "block_size": {"Phi-3.5-mini-instruct", *(f"{kind}emma-{size}" for kind in ("G", "CodeG") for size in ("2b", "7b"))}
    | {"Gemma-2b-it", "Gemma-7b-it", "CodeGemma-7b-it"},
    "padded_vocab_size": {"Gemma-3-4b-it", "Gemma-3-12b-it", "Gemma-3-27b-it"},
    "n_query_groups": {"Platypus2-70B"},
}


def test_every_name_of_litgpt_has_its_shape() -> None:
    seen = 0
    for line in LITGPT_SHAPES[1:]:
        values, listed = line.split("; ")
        for name in listed.split():
            shape, seen = Config.from_name(name).to_dict(), seen + 1
            for field, value in zip(LITGPT_FIELDS, values.split(), strict=True):
                assert shape[field] == float(value) or name in AS_PUBLISHED.get(field, ()), (name, field)
    assert seen == 210


@pytest.mark.parametrize(
    ("name", "litgpt", "ours"),
    [
        ("Gemma-2-2b", {"norm_class_name": "RMSNorm", "norm_eps": 1e-5}, {"norm_class_name": "OffsetRMSNorm"}),
        ("Gemma-3-4b-it", {"norm_class_name": "RMSNorm", "norm_eps": 1e-5}, {"norm_eps": 1e-6, "tie_embeddings": True}),
        ("OLMo-7B-hf", {"norm_class_name": "LayerNorm"}, {"norm_class_name": "BareLayerNorm"}),
        ("OLMo-2-1124-7B", {}, {"tie_embeddings": False}),
        ("Phi-3-mini-4k-instruct", {"sliding_window_size": 2048}, {"sliding_window_size": 2047}),
        ("Phi-4-mini-instruct", {"rope_adjustments": None, "sliding_window_size": 262145}, {"tie_embeddings": True}),
        ("falcon-40b", {}, {"tie_embeddings": True}),
        ("phi-2", {}, {"lm_head_bias": True}),
    ],
)
def test_litgpt_folder_of_a_named_model_is_that_model(
    name: str, litgpt: dict[str, Any], ours: dict[str, Any], tmp_path: Path
) -> None:
    write_litgpt_form(tmp_path, name, **litgpt)
    shape = Config.from_checkpoint(tmp_path)
    assert shape == Config.from_name(name) and find_family(shape) == find_family(Config.from_name(name))
    assert {key: getattr(shape, key) for key in ours} == ours


@pytest.mark.parametrize(
    ("kind", "old", "new"),
    [
        (
            "gemma3_text",
            {"rope_theta": 5e5, "rope_local_base_freq": 2e3, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}
            | {"num_hidden_layers": 5, "sliding_window_pattern": 3},
            {
                "num_hidden_layers": 5,
                "layer_types": [*["sliding_attention"] * 2, "full_attention", *["sliding_attention"] * 2],
                "rope_parameters": {
                    "sliding_attention": {"rope_theta": 2e3},
                    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e5},
                },
            },
        ),
        (
            "qwen2",
            {"num_hidden_layers": 3, "use_sliding_window": True, "sliding_window": 9, "max_window_layers": 2},
            {"num_hidden_layers": 3, "use_sliding_window": True, "sliding_window": 9}
            | {"layer_types": ["full_attention", "full_attention", "sliding_attention"]},
        ),
        (
            "smollm3",
            {"num_hidden_layers": 4, "no_rope_layer_interval": 2},
            {"num_hidden_layers": 4, "no_rope_layers": [1, 0, 1, 0]},
        ),
        (
            "phi3",
            {"rope_scaling": {"type": "su", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48}, "rope_theta": 9e3}
            | {"max_position_embeddings": 8192, "original_max_position_embeddings": 2048},
            {"max_position_embeddings": 8192}
            | {
                "rope_parameters": {"rope_type": "longrope", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48}
                | {"factor": 4.0, "original_max_position_embeddings": 2048, "rope_theta": 9e3}
            }
            | {"original_max_position_embeddings": 2048},
        ),
        (
            "llama",
            {"rope_scaling": {"type": "yarn", "factor": 2.0}, "max_position_embeddings": 512},
            {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "beta_fast": 32, "beta_slow": 1}}
            | {"max_position_embeddings": 512},
        ),
    ],
)
def test_older_files_say_the_same(kind: str, old: dict[str, Any], new: dict[str, Any]) -> None:
    family = load_families()[kind]
    assert family.read(old) == family.read(new)


DENSE = [name for name, family in load_families().items() if family.fixed.get("mlp_class_name") != "LLaMAMoE"]


@pytest.mark.parametrize("kind", sorted(name for name in DENSE if not load_families()[name].nested))
def test_what_is_written_reads_back_and_no_key_is_lost(kind: str) -> None:
    family = load_families()[kind]
    shape = family.read({})
    assert family.can_express(shape) and find_family(shape) is not None
    assert json.loads(json.dumps(family.config_json(shape))) == family.config_json(shape)


def test_a_family_with_a_tower_has_peft_read_experts_as_its_decoder_has() -> None:
    families = load_families()
    assert families["llama4"].transposed_in_peft and families["llama4_text"].transposed_in_peft
    assert not families["qwen3_vl_moe"].transposed_in_peft


def test_longrope_is_written_as_older_transformers_wants_it() -> None:
    written = load_families()["phi3"].config_json(Config.from_name("Phi-3-mini-128k-instruct"))
    assert written["rope_scaling"].keys() == {"type", "short_factor", "long_factor"}
    assert written["original_max_position_embeddings"] == 4096 and written["max_position_embeddings"] == 131072


def test_plainest_family_for_a_shape_of_several() -> None:
    for kind in ("llama", "gpt_neox", "mistral", "qwen2", "qwen3"):
        shape = load_families()[kind].read({})
        assert find_family(Config(**{**shape.to_dict(), "hf_config": {}})).name == kind
    assert find_family(load_families()["seed_oss"].read({})).name == "seed_oss"
    sharpened = load_families()["ministral3"].read({})
    assert find_family(sharpened).name == "ministral3"
    assert find_family(Config(**{**sharpened.to_dict(), "query_temperature": None})).name == "llama"


def test_changes_decide_the_family_not_the_name() -> None:
    assert find_family(Config.from_name("pythia-14m", n_query_groups=2)) is None
    assert find_family(Config.from_name("pythia-14m", shared_attention_norm=True)) is None
    assert find_family(Config.from_name("Qwen3-0.6B", norm_qk=False)).name == "llama"
    renamed = Config(**{**Config.from_name("Gemma-2b").to_dict(), "name": "anything"})
    assert find_family(renamed).name == "gemma"
    assert find_family(Config.from_name("pythia-14m", dropout=0.1)).name == "gpt_neox"
    both: dict[str, Any] = {
        "rope_adjustments": Config.from_name("Llama-3.1-8B").rope_adjustments,
        "rope_condense_ratio": 2,
    }
    assert find_family(Config.from_name("Llama-3.1-8B", **both)) is None


def write_litgpt_form(folder: Path, model: str, **changes: Any) -> None:
    """A `model_config.yaml` with LitGPT's fields only."""
    values = {**Config.from_name(model).to_dict(), **changes}
    del values["tie_embeddings"], values["dropout"]
    (folder / "model_config.yaml").write_text(yaml.dump(values))


def test_litgpt_form_of_a_named_model_gets_what_it_cannot_say(tmp_path: Path) -> None:
    write_litgpt_form(tmp_path, "Gemma-2b", norm_class_name="RMSNorm", norm_eps=1e-5)
    assert Config.from_checkpoint(tmp_path) == Config.from_name("Gemma-2b")
    write_litgpt_form(tmp_path, "Gemma-2b", norm_class_name="RMSNorm", norm_eps=1e-5, name="my-Gemma")
    assert Config.from_checkpoint(tmp_path).norm_class_name == "RMSNorm"
    write_litgpt_form(tmp_path, "Llama-3.2-1B", n_layer=2)
    assert (Config.from_checkpoint(tmp_path).tie_embeddings, Config.from_checkpoint(tmp_path).n_layer) == (True, 2)
    write_litgpt_form(tmp_path, "pythia-14m")
    assert Config.from_checkpoint(tmp_path) == Config.from_name("pythia-14m")


def test_our_own_form_is_taken_at_its_word(tmp_path: Path) -> None:
    untied = Config.from_name("Gemma-2b", tie_embeddings=False, norm_eps=1e-5)
    (tmp_path / "model_config.yaml").write_text(yaml.dump(untied.to_dict()))
    assert Config.from_checkpoint(tmp_path) == untied


def test_both_forms_of_rope_in_config_json(tmp_path: Path) -> None:
    wanted = Config.from_name("Llama-3.2-1B")
    written = load_families()["llama"].config_json(wanted)
    for left_out in (["rope_parameters"], ["rope_theta", "rope_scaling"]):
        values = {key: value for key, value in written.items() if key not in left_out}
        (tmp_path / "config.json").write_text(json.dumps(values))
        shape = Config.from_checkpoint(tmp_path)
        assert (shape.rope_base, shape.rope_adjustments) == (500000, wanted.rope_adjustments)


def test_absent_keys_mean_what_transformers_assumes(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt_neox", "hidden_size": 512}))
    shape = Config.from_checkpoint(tmp_path)
    assert (shape.n_layer, shape.n_head, shape.rotary_percentage, shape.padded_vocab_size) == (44, 64, 0.25, 50432)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"model_type": "mamba"}, ["mamba", "llama", "gpt_neox"]),
        ({}, ["model_type", "llama"]),
        ({"model_type": ["llama"]}, ["model_type"]),
        ({"model_type": "llama", "hidden_act": "relu"}, ["hidden_act", "relu", "silu"]),
        ({"model_type": "llama", "hidden_size": -4}, ["n_embd", "-4"]),
        ({"model_type": "llama", "hidden_size": "many"}, ["n_embd", "many"]),
        ({"model_type": "llama", "num_hidden_layers": 10**9}, ["n_layer"]),
        ({"model_type": "llama", "rope_scaling": {"type": "axial", "factor": 2.0}}, ["rope_type", "axial", "yarn"]),
        ({"model_type": "falcon", "alibi": True}, ["alibi", "True"]),
        ({"model_type": "gpt2", "scale_attn_by_inverse_layer_idx": True}, ["scale_attn_by_inverse_layer_idx"]),
        ({"model_type": "gemma3", "text_config": None}, ["text_config"]),
        ({"model_type": "olmo", "clip_qkv": 8.0}, ["clip_qkv", "8.0"]),
        ({"model_type": "granite", "logits_scaling": 0}, ["logits_scaling", "0"]),
        ({"model_type": "smollm3", "no_rope_layers": [2] * 36}, ["no_rope_layers"]),
        ({"model_type": "gptj", "rotary_dim": None}, ["rotary_dim"]),
        ({"model_type": "llama", "rope_parameters": "long"}, ["rope_parameters", "long"]),
        ({"model_type": "qwen3", "rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, ["rope_parameters"]),
        ({"model_type": "llama", "rope_scaling": {"type": "linear"}}, ["factor"]),
        ({"model_type": "mistral", "sliding_window": 0}, ["sliding_window_size", "0"]),
        ({"model_type": "qwen2", "use_sliding_window": True, "layer_types": ["mamba"]}, ["layer_types", "mamba"]),
        ({"model_type": "qwen2", "use_sliding_window": True, "num_hidden_layers": 10**9}, ["n_layer"]),
    ],
)
def test_config_json_that_cannot_run_answers_in_one_line(tmp_path: Path, values: Any, words: list[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(UserError) as caught:
        Config.from_checkpoint(tmp_path)
    assert "\n" not in str(caught.value) and all(word in str(caught.value) for word in words), str(caught.value)


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["rope_type", "factor"]), inner),
    max_leaves=3,
)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(sorted(load_families())), st.data())
def test_any_junk_in_config_json_is_a_shape_or_a_user_error(name: str, data: st.DataObject) -> None:
    family = load_families()[name]
    keys = [*family.missing, *family.expect, *family.config.values(), "rope_scaling", "rope_parameters", "layer_types"]
    values = data.draw(st.dictionaries(st.sampled_from(sorted(set(keys))), JUNK, max_size=3))
    try:
        family.read(values)
    except UserError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize("text", ["{", "[1]", "\x00", "[" * 100_000])
def test_malformed_config_json_answers_in_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError) as caught:
        Config.from_checkpoint(tmp_path)
    assert "\n" not in str(caught.value)


def test_names_and_shapes_need_no_torch() -> None:
    code = "import sys, litgpt.model.registry as r; r.lookup_config('gpt2'); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


NAMED = ["pythia-14m", "Llama-3-8B", "Qwen2.5-7B", "Qwen3-8B", "Gemma-7b"]


def tiny(name: str) -> tuple[Config, dict[str, torch.Tensor]]:
    """A named architecture at toy size with random tensors."""
    size = {"n_layer": 2, "n_embd": 32, "n_head": 4, "head_size": 8, "intermediate_size": 40, "padded_vocab_size": 32}
    groups = 4 if name == "pythia-14m" else 2
    config = Config.from_name(name, **size, n_query_groups=groups, tie_embeddings=False)
    return config, {key: torch.randn(value.shape) for key, value in meta(config).state_dict().items()}


@pytest.mark.parametrize("name", NAMED)
def test_litgpt_names_round_trip_to_the_bit(name: str) -> None:
    config, ours = tiny(name)
    theirs = to_hf_names(load_litgpt_table(), ours, config)
    width = (4 + 2 * config.n_query_groups) * 8
    assert theirs["transformer.h.1.attn.qkv.weight"].shape == (width, 32)
    assert torch.equal(theirs["transformer.h.1.attn.qkv.weight"][:32], ours["blocks.1.attention.q.weight"])
    back = to_our_names(load_litgpt_table(), theirs, config)
    assert back.keys() == ours.keys() and all(torch.equal(back[key], ours[key]) for key in ours)


def test_litgpt_interleaved_rows_are_read() -> None:
    config, ours = tiny("Llama-3-8B")
    theirs = to_hf_names(load_litgpt_table(), ours, config)
    for layer in range(2):
        q, k, v = theirs.pop(f"transformer.h.{layer}.attn.qkv.weight").split([32, 16, 16])
        groups = [torch.cat([q[16 * g : 16 * g + 16], k[8 * g : 8 * g + 8], v[8 * g : 8 * g + 8]]) for g in range(2)]
        theirs[f"transformer.h.{layer}.attn.attn.weight"] = torch.cat(groups)
    back = to_our_names(load_litgpt_table(), theirs, config)
    assert all(torch.equal(back[key], ours[key]) for key in ours)


def test_unnamed_missing_and_misshaped_tensors_are_refused_by_name() -> None:
    config, ours = tiny("pythia-14m")
    table = load_families()["gpt_neox"].tensors
    theirs = to_hf_names(table, ours, config)
    assert table.map_hf_name("model.extra.weight", config) is None
    with pytest.raises(UserError, match=r"blocks\.0\.extra\.weight"):
        to_hf_names(table, {**ours, "blocks.0.extra.weight": torch.zeros(1)}, config)
    with pytest.raises(UserError, match=r"blocks\.1\.attention\.k\.bias"):
        to_hf_names(table, {key: ours[key] for key in ours if key != "blocks.1.attention.k.bias"}, config)
    fused = "gpt_neox.layers.0.attention.query_key_value.weight"
    with pytest.raises(UserError, match=fused):
        to_our_names(table, {**theirs, fused: torch.zeros(90, 32)}, config)
    kept = to_our_names(table, {**theirs, "gpt_neox.layers.0.attention.masked_bias": torch.zeros(1)}, config)
    assert kept.keys() == ours.keys()


@pytest.mark.parametrize(
    ("page", "texts"),
    [
        (
            "README.md",
            ["**Models**: {plain} architectures", "and {vision} with a vision tower", "| {plain} architectures,"],
        ),
        ("CHANGELOG.md", ["Models of texts of {plain} published architectures"]),
    ],
)
def test_pages_state_the_number_of_architectures(page: str, texts: list[str]) -> None:
    families = load_families().values()
    plain = {name for family in families if not family.towers for name in family.architectures}
    vision = {
        name
        for family in families
        if any(tower.part == "vision" for tower in family.towers)
        for name in family.architectures
    }
    content = " ".join((Path(__file__).parents[2] / page).read_text(encoding="utf-8").split())
    for text in texts:
        assert text.format(plain=len(plain), vision=spell_number(len(vision))) in content
