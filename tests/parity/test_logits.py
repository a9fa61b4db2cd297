"""Our decoder against transformers where logits do not tell: gradients, bfloat16, tied heads, our own models there."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from litgpt.errors import UserError
from litgpt.model.config import Config
from litgpt.model.gpt import GPT
from litgpt.model.init import initialize
from litgpt.model.names import to_hf_names
from litgpt.model.registry import Family, find_family, load_families
from litgpt.store.tensor_audit import audit_source
from tests.store.models import as_source, to_our_names

SIZES = {"vocab_size": 96, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 80}
NO_IDS = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
QUARTER = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "neox": ("GPTNeoX", {"rope_parameters": QUARTER}),
    "llama": ("Llama", {"rms_norm_eps": 1e-5}),
    "llama-grouped-tied": ("Llama", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "gemma": ("Gemma", {"num_key_value_heads": 1, "head_dim": 16}),
    "gemma2": ("Gemma2", {"num_key_value_heads": 2, "head_dim": 16, "sliding_window": 8}),
    "olmo2": ("Olmo2", {"num_key_value_heads": 2}),
    "cohere": ("Cohere", {"use_qk_norm": True, "logit_scale": 0.5}),
    "nemotron": ("Nemotron", {"num_key_value_heads": 2, "rope_parameters": QUARTER}),
    "falcon": ("Falcon", {"multi_query": True}),
}


def build_reference(name: str) -> Any:
    """A small transformers model with every parameter random, norms and biases included."""
    kind, changes = MODELS[name]
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **NO_IDS, "max_position_embeddings": 128, **changes})
    config._attn_implementation = "eager"
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def save_and_read(model: Any, folder: Path) -> tuple[Config, dict[str, Tensor]]:
    """Shape and tensors as they are in the folder that transformers writes."""
    model.save_pretrained(folder)
    return Config.from_checkpoint(folder), load_file(folder / "model.safetensors")


def open_in_transformers(folder: Path, family: Family, config: Config, tensors: dict[str, Tensor]) -> Any:
    """The transformers model of a folder with our config.json and these published tensors."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(family.config_json(config)))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    model, report = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, dtype="float32")
    assert not any(report.values()), report
    return model.eval()


def build_model(config: Config, tensors: dict[str, Tensor]) -> GPT:
    with torch.device("meta"):
        model = GPT(config)
    missing, unexpected = model.load_state_dict(tensors, strict=True, assign=True)
    assert not missing and not unexpected
    return model.eval()


@pytest.mark.parametrize("name", [name for name in MODELS if name != "llama-grouped-tied"])
def test_gradients_equal_transformers(name: str, tmp_path: Path) -> None:
    hf_model = build_reference(name)
    config, tensors = save_and_read(hf_model, tmp_path)
    family = load_families()[hf_model.config.model_type]
    model = build_model(config, to_our_names(family.tensors, tensors, config))
    ids = torch.randint(0, 96, (2, 40), generator=torch.Generator().manual_seed(2))
    for each, logits in ((hf_model, hf_model(ids).logits), (model, model(ids))):
        each.requires_grad_(True)
        logits.logsumexp(-1).sum().backward()
    expected = to_our_names(family.tensors, {key: p.grad for key, p in hf_model.named_parameters()}, config)
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(
            parameter.grad, expected[key], atol=1e-4, rtol=1e-4, msg=lambda text, key=key: key + text
        )


def test_bfloat16_stays_close_to_transformers(tmp_path: Path) -> None:
    hf_model = build_reference("gemma")
    config, tensors = save_and_read(hf_model, tmp_path)
    model = build_model(config, to_our_names(load_families()["gemma"].tensors, tensors, config)).bfloat16()
    ids = torch.randint(0, 96, (2, 64), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        exact, actual, expected = hf_model(ids).logits, model(ids), hf_model.bfloat16()(ids).logits
    assert actual.dtype == torch.bfloat16
    assert (actual - exact).abs().mean() <= 1.2 * (expected - exact).abs().mean()


def test_named_shape_writes_the_published_config(tmp_path: Path) -> None:
    config = Config.from_name("Llama-3.2-1B")
    family = find_family(config)
    assert family is not None
    (tmp_path / "config.json").write_text(json.dumps(family.config_json(config)))
    loaded = transformers.AutoConfig.from_pretrained(tmp_path)
    assert loaded.rope_parameters["rope_type"] == "llama3" and loaded.rope_parameters["rope_theta"] == 500000.0
    assert loaded.tie_word_embeddings and loaded.num_key_value_heads == 8 and loaded.head_dim == 64
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(loaded)
    assert sum(parameter.numel() for parameter in model.parameters()) == 1_235_814_400


def test_untied_head_in_a_tied_model_is_refused(tmp_path: Path) -> None:
    hf_model = build_reference("llama-grouped-tied")
    config, tensors = save_and_read(hf_model, tmp_path)
    same = {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    table = load_families()["llama"].tensors
    assert to_our_names(table, same, config).keys() == to_our_names(table, tensors, config).keys()
    audit_source(as_source(same), table, config).check()
    with pytest.raises(UserError, match="tie_embeddings"):
        audit_source(as_source({**same, "lm_head.weight": torch.zeros(96, 48)}), table, config).check()


def test_initialised_model_runs_in_transformers(tmp_path: Path) -> None:
    config = Config(
        n_layer=2, n_embd=32, n_head=4, n_query_groups=2, padded_vocab_size=64, bias=False, parallel_residual=False,
        rotary_percentage=1.0, norm_class_name="RMSNorm", mlp_class_name="LLaMAMLP", intermediate_size=48,
    )  # fmt: skip
    model = GPT(config).eval()
    initialize(model, 7)
    family = find_family(config)
    assert family is not None and family.name == "llama"
    hf_model = open_in_transformers(
        tmp_path / "exported", family, config, to_hf_names(family.tensors, model.state_dict(), config)
    )
    ids = torch.arange(50)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(ids), hf_model(ids).logits, atol=1e-5, rtol=1e-5)
