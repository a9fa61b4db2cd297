"""Every family against transformers: a small random model read as it is published, and written so that it loads there.

A new family is one line in `ROWS`: the transformers class and the settings of a small model, such that every branch
of the architecture is taken (both kinds of layers, windows and first contexts shorter than the rows).
"""

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from litgpt.model.config import Config
from litgpt.model.gpt import GPT
from litgpt.model.registry import load_families
from litgpt.store.load_model import load_model
from litgpt.store.save_model import save_model_folder

TOKENS, PADDED = 48, (0, 5, 17)
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 10000.0}
LONG = {"rope_type": "longrope", "short_factor": [1.0, 1.1, 1.3, 1.6], "long_factor": [1.0, 2.0, 4.0, 8.0]}
BOTH = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 10000.0},
}
TEMPERED = {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.3}


def of(kind: str) -> dict[str, Any]:
    """Rope settings of a kind with a base."""
    return {"rope_type": kind, "rope_theta": 10000.0}


class Row(NamedTuple):
    """A small model: the start of its class's name, its settings, and how close logits come (1e-5, or why not)."""

    kind: str
    settings: dict[str, Any]
    tolerance: float = 1e-5


ROWS = {
    "llama": Row("Llama", {"head_dim": 16, "attention_bias": True, "mlp_bias": True}),
    "llama-one-group": Row("Llama", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "llama-llama3": Row(
        "Llama", {"rope_parameters": {**LLAMA3, "original_max_position_embeddings": 32, "rope_theta": 1e4}}
    ),
    "llama-linear": Row("Llama", {"rope_parameters": {**of("linear"), "factor": 4.0}}),
    "llama-dynamic": Row("Llama", {"rope_parameters": {**of("dynamic"), "factor": 2.0}, "max_position_embeddings": 32}),
    "llama-yarn": Row("Llama", {"rope_parameters": YARN}),
    "llama-yarn-told": Row(
        "Llama", {"rope_parameters": {**YARN, "attention_factor": 1.1, "beta_fast": 8.0, "truncate": False}}
    ),
    "mistral": Row("Mistral", {"sliding_window": 8}),
    "mistral-whole-view": Row("Mistral", {"sliding_window": None, "head_dim": 16}),
    "ministral": Row(
        "Ministral", {"head_dim": 8, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2}
    ),
    "ministral3": Row("Ministral3", {"rope_parameters": TEMPERED, "head_dim": 16}),
    "qwen2": Row("Qwen2", {"tie_word_embeddings": True}),
    "qwen2-window": Row("Qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}),
    "qwen3": Row("Qwen3", {"head_dim": 16}),
    "qwen3-bias-window": Row(
        "Qwen3", {"attention_bias": True, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
    ),
    "gemma": Row("Gemma", {"head_dim": 16, "num_key_value_heads": 1, "rms_norm_eps": 1e-3}),
    "gemma-untied": Row("Gemma", {"head_dim": 12, "num_key_value_heads": 4, "tie_word_embeddings": False}),
    "gemma2": Row("Gemma2", {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 10}),
    "gemma3": Row(
        "Gemma3Text",
        {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 10, "rope_parameters": BOTH}
        | {"layer_types": ["sliding_attention", "full_attention"] * 2},
    ),
    "vaultgemma": Row(
        "VaultGemma",
        {"head_dim": 16, "sliding_window": 8, "attn_logit_softcapping": 3.0, "query_pre_attn_scalar": 10}
        | {"rms_norm_eps": 1e-3},
    ),
    "gpt_neox": Row("GPTNeoX", {"rope_parameters": {**of("default"), "partial_rotary_factor": 0.5}}),
    "gpt_neox-serial": Row(
        "GPTNeoX",
        {"use_parallel_residual": False, "tie_word_embeddings": True, "num_attention_heads": 2}
        | {"rope_parameters": {**of("default"), "partial_rotary_factor": 0.25}},
    ),
    "gpt_neox-whole-heads": Row("GPTNeoX", {"rope_parameters": {**of("default"), "partial_rotary_factor": 1.0}}),
    "gpt2": Row("GPT2", {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}),
    "gpt_bigcode": Row("GPTBigCode", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "gpt_bigcode-heads": Row(
        "GPTBigCode", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "multi_query": False}
    ),
    "gptj": Row("GPTJ", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "rotary_dim": 4}),
    "falcon": Row("Falcon", {}),
    "falcon-two-norms": Row("Falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon-one-norm": Row(
        "Falcon", {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1, "bias": True}
    ),
    "falcon-serial": Row("Falcon", {"multi_query": False, "parallel_attn": False, "bias": True}),
    "phi": Row("Phi", {"rope_parameters": {**of("default"), "partial_rotary_factor": 0.5}}),
    "phi-normed-heads": Row("Phi", {"qk_layernorm": True, "num_key_value_heads": 2}),
    "phi3": Row("Phi3", {"sliding_window": 8}),
    "phi3-longrope": Row(
        "Phi3",
        {"rope_parameters": {**LONG, "rope_theta": 1e4, "partial_rotary_factor": 1.0}}
        | {"original_max_position_embeddings": 16, "tie_word_embeddings": True},
    ),
    "phi3-longrope-short": Row(
        "Phi3",
        {"rope_parameters": {**LONG, "rope_theta": 1e4, "partial_rotary_factor": 1.0, "attention_factor": 1.2}}
        | {"original_max_position_embeddings": 56},
    ),
    "stablelm": Row("StableLm", {"rope_parameters": {**of("default"), "partial_rotary_factor": 0.5}}),
    "stablelm-parallel": Row("StableLm", {"use_qkv_bias": True, "use_parallel_residual": True}),
    "olmo": Row("Olmo", {"attention_bias": True}),
    "olmo2": Row("Olmo2", {}),
    "olmo3": Row("Olmo3", {"sliding_window": 8, "num_hidden_layers": 5}),
    "olmo3-yarn": Row(
        "Olmo3",
        {"sliding_window": 8, "num_hidden_layers": 4}
        | {"rope_parameters": {"sliding_attention": of("default"), "full_attention": YARN}},
    ),
    "smollm3": Row("SmolLM3", {"num_hidden_layers": 5}),
    "smollm3-listed": Row("SmolLM3", {"no_rope_layers": [0, 1, 1, 0], "tie_word_embeddings": False}),
    "granite": Row(
        "Granite",
        {"embedding_multiplier": 3.0, "residual_multiplier": 0.3, "logits_scaling": 4.0, "attention_multiplier": 0.2}
        | {"rms_norm_eps": 1e-3},
    ),
    "cohere": Row("Cohere", {"logit_scale": 0.5}),
    "cohere-normed-heads": Row("Cohere", {"use_qk_norm": True, "attention_bias": True, "logit_scale": 0.5}),
    "cohere2": Row("Cohere2", {"sliding_window": 8, "num_hidden_layers": 5, "logit_scale": 0.5}),
    "glm": Row("Glm", {"head_dim": 16, "num_key_value_heads": 2, "rms_norm_eps": 1e-3}),
    "glm4": Row("Glm4", {"head_dim": 16, "attention_bias": False}),
    "starcoder2": Row("Starcoder2", {"sliding_window": 8}),
    "starcoder2-bare": Row("Starcoder2", {"use_bias": False}),
    "nemotron": Row("Nemotron", {"head_dim": 16, "attention_bias": True}),
    "helium": Row("Helium", {"head_dim": 8, "attention_bias": True, "rms_norm_eps": 1e-3}),
    "seed_oss": Row("SeedOss", {"head_dim": 16}),
    "arcee": Row("Arcee", {"mlp_bias": True}),
    "ernie4_5": Row("Ernie4_5", {"head_dim": 16, "use_bias": True}),
    "exaone4": Row("Exaone4", {"sliding_window": 8, "num_hidden_layers": 5}),
    "exaone4-whole-view": Row("Exaone4", {"sliding_window": None, "layer_types": ["full_attention"] * 4}),
    "hunyuan": Row("HunYuanDenseV1", {"head_dim": 8}),
    "hunyuan-stretched": Row(
        "HunYuanDenseV1", {"head_dim": 8, "rope_parameters": {**of("dynamic"), "factor": 1.0, "alpha": 50.0}}
    ),
    "cwm": Row("Cwm", {"head_dim": 16, "sliding_window": 8, "num_hidden_layers": 5}),
    "persimmon": Row("Persimmon", {}),
}
DRAWING = {"emu3", "emu3_text_model", "chameleon"}  # in tests of their own, with codes of images
SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def build_reference(row: Row) -> Any:
    """A small transformers model with every number random, norms, biases and sinks included."""
    own_sizes = {"vocab_size": 96} if "n_embd" in row.settings else SIZES
    if row.kind in ("Falcon", "GPTNeoX", "Persimmon"):
        own_sizes = {key: size for key, size in own_sizes.items() if key != "num_key_value_heads"}
    config = getattr(transformers, f"{row.kind}Config")(**{**own_sizes, **IDS, **row.settings})
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for tensor in [*model.parameters(), *(each for name, each in model.named_buffers() if name.endswith("_bias"))]:
            if tensor.is_floating_point():
                tensor.add_(torch.randn_like(tensor) * 0.1)
    return model


def make_rows() -> tuple[Tensor, Tensor, Tensor]:
    """Random rows, where they are not padded on the left, and the positions that start after the padding."""
    ids = torch.randint(0, 96, (len(PADDED), TOKENS), generator=torch.Generator().manual_seed(1))
    real = torch.arange(TOKENS)[None] >= torch.tensor(PADDED)[:, None]
    return ids, real, (real.long().cumsum(1) - 1).clamp(min=0)


@torch.no_grad()
def compute_hf_logits(model: Any) -> tuple[Tensor, Tensor]:
    """Logits of whole rows, and of the tokens of rows padded on the left."""
    ids, real, positions = make_rows()
    padded = model(ids, attention_mask=real.long(), position_ids=positions, use_cache=False).logits
    return model(ids, use_cache=False).logits, padded[real]


@torch.no_grad()
def compute_logits(model: GPT) -> tuple[Tensor, Tensor]:
    """The same of our model, where padding is a document of its own."""
    ids, real, positions = make_rows()
    return model(ids), model(ids, positions_BT=positions, documents_BT=(~real).long())[real]


def load_in_transformers(folder: Path) -> Any:
    """The transformers model of a folder, which must use and have all tensors."""
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, dtype="float32", attn_implementation="eager"
    )
    assert not any(report.values()), report
    return model.eval()


@pytest.mark.parametrize("name", ROWS)
def test_family_as_published(name: str, tmp_path: Path) -> None:
    row = ROWS[name]
    hf_model, source, export = build_reference(row), tmp_path / "published", tmp_path / "export"
    hf_model.save_pretrained(source)
    config = Config.from_checkpoint(source)

    model = GPT(config).eval()
    load_model(model, source)
    hf_logits = compute_hf_logits(hf_model)
    for logits, expected in zip(compute_logits(model), hf_logits, strict=True):
        assert expected.std() > 0.1
        torch.testing.assert_close(logits, expected, atol=row.tolerance, rtol=row.tolerance)

    save_model_folder(export, config=config, tensors=((key, value.detach()) for key, value in model.named_parameters()))
    exported, original = load_file(export / "model.safetensors"), load_file(source / "model.safetensors")
    assert exported.keys() == original.keys()
    assert all(torch.equal(exported[key], original[key]) for key in original)
    loaded = load_in_transformers(export)
    assert type(loaded) is type(hf_model)
    for logits, expected in zip(compute_hf_logits(loaded), hf_logits, strict=True):
        assert torch.equal(logits, expected)
    assert Config.from_checkpoint(export) == config
    (export / "model_config.yaml").unlink()
    assert Config.from_checkpoint(export) == Config(**{**config.to_dict(), "name": "export"})


def test_file_of_a_model_without_head_and_with_buffers(tmp_path: Path) -> None:
    hf_model = build_reference(ROWS["gpt2"])
    hf_model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    mask = {f"h.{layer}.attn.bias": torch.ones(1, 1, 64, 64).tril() for layer in range(3)}
    save_file({**bare, **mask}, tmp_path / "model.safetensors")
    model = GPT(Config.from_checkpoint(tmp_path)).eval()
    load_model(model, tmp_path)
    ids, _, _ = make_rows()
    with torch.no_grad():
        torch.testing.assert_close(model(ids), hf_model(ids).logits, atol=1e-5, rtol=1e-5)


def test_every_family_without_experts_has_a_row() -> None:
    tested = {getattr(transformers, f"{row.kind}Config").model_type for row in ROWS.values()}
    families = [each for each in load_families().values() if not each.towers]
    dense = {each.model_type for each in families if each.fixed.get("mlp_class_name") != "LLaMAMoE"}
    assert tested | DRAWING == dense and len(tested) >= 37
