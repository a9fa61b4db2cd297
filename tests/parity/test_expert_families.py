"""Families with experts and latent attention against transformers: logits, left padding, and folders both ways."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from litgpt.model.config import Config
from litgpt.model.gpt import GPT
from litgpt.model.names import NO_SUCH_PART
from litgpt.model.registry import find_family, load_families
from litgpt.store.load_model import load_config, load_model
from litgpt.store.save_model import save_model_folder
from tests.store.models import to_our_names

SIZES: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 40, "max_position_embeddings": 128, "pad_token_id": None, "bos_token_id": None,
    "eos_token_id": None,
}  # fmt: skip
YARN = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "beta_fast": 32, "beta_slow": 1, "mscale": 0.707,
    "mscale_all_dim": 0.8, "original_max_position_embeddings": 32,
}  # fmt: skip
LATENT = {"kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 12, "v_head_dim": 20, "num_key_value_heads": 4}
ROUTED = {"n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 24, "n_shared_experts": 2}
GROUPS = {"n_group": 4, "topk_group": 2}
QWEN = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True}
GRANITE = {"num_local_experts": 6, "num_experts_per_tok": 2, "attention_multiplier": 0.11, "residual_multiplier": 0.7,
           "embedding_multiplier": 3.0, "logits_scaling": 2.0}  # fmt: skip
LLAMA4 = {"num_local_experts": 4, "head_dim": 8, "intermediate_size_mlp": 44}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("Mixtral", {"num_local_experts": 6}),
    "mixtral-window": ("Mixtral", {"num_local_experts": 4, "sliding_window": 20}),
    "qwen2-moe": ("Qwen2Moe", {**QWEN, "norm_topk_prob": False, "shared_expert_intermediate_size": 28}),
    "qwen2-moe-sparse": ("Qwen2Moe", {**QWEN, "shared_expert_intermediate_size": 28, "decoder_sparse_step": 2,
                                      "mlp_only_layers": [1], "qkv_bias": False}),
    "qwen3-moe": ("Qwen3Moe", {**QWEN, "head_dim": 16}),
    "qwen3-moe-unnormed": ("Qwen3Moe", {**QWEN, "norm_topk_prob": False, "mlp_only_layers": [0],
                                        "attention_bias": True}),
    "olmoe": ("Olmoe", {"num_experts": 6, "num_experts_per_tok": 2}),
    "deepseek-v2": ("DeepseekV2", {**LATENT, **ROUTED, **GROUPS, "q_lora_rank": 20, "first_k_dense_replace": 1,
                                   "topk_method": "group_limited_greedy", "routed_scaling_factor": 1.5,
                                   "rope_parameters": YARN}),
    "deepseek-v2-lite": ("DeepseekV2", {**LATENT, **ROUTED, "q_lora_rank": None, "first_k_dense_replace": 1}),
    "deepseek-v3": ("DeepseekV3", {**LATENT, **ROUTED, **GROUPS, "q_lora_rank": 20, "first_k_dense_replace": 1,
                                   "rope_parameters": YARN, "rms_norm_eps": 1e-5}),
    "deepseek-v3-plain": ("DeepseekV3", {**LATENT, **ROUTED, "q_lora_rank": None, "n_group": 1, "topk_group": 1,
                                         "first_k_dense_replace": 0, "norm_topk_prob": False, "attention_bias": True,
                                         "rope_interleave": False}),
    "glm4-moe": ("Glm4Moe", {**ROUTED, **GROUPS, "head_dim": 16, "use_qk_norm": True, "attention_bias": True,
                             "first_k_dense_replace": 1, "routed_scaling_factor": 2.5}),
    "glm4-moe-air": ("Glm4Moe", {**ROUTED, "head_dim": 16, "first_k_dense_replace": 2}),
    "gpt-oss": ("GptOss", {"num_local_experts": 6, "num_experts_per_tok": 2, "head_dim": 16, "sliding_window": 20}),
    "llama4": ("Llama4", {**LLAMA4, "attention_chunk_size": 24, "floor_scale": 16}),
    "llama4-sparse": ("Llama4", {**LLAMA4, "use_qk_norm": False, "interleave_moe_layer_step": 2,
                                 "attn_temperature_tuning": False, "num_experts_per_tok": 2}),
    "granite-moe": ("GraniteMoe", GRANITE),
    "granite-moe-shared": ("GraniteMoeShared", {**GRANITE, "shared_intermediate_size": 20}),
    "ernie-moe": ("Ernie4_5_Moe", {"moe_num_experts": 8, "moe_k": 3, "moe_intermediate_size": 24, "head_dim": 8,
                                   "moe_num_shared_experts": 2, "moe_layer_start_index": 1, "moe_layer_end_index": 2}),
    "dots1": ("Dots1", {**ROUTED, **GROUPS, "first_k_dense_replace": 1, "norm_topk_prob": True, "sliding_window": 20,
                        "max_window_layers": 2}),
}  # fmt: skip


def build_reference(name: str) -> Any:
    """A small transformers model with every parameter random, router corrections included."""
    kind, changes = MODELS[name]
    shape = getattr(transformers, "Llama4TextConfig" if kind == "Llama4" else f"{kind}Config")
    config = shape(**{**SIZES, **changes})
    config._attn_implementation, config._experts_implementation = "eager", "eager"
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    generator = torch.Generator().manual_seed(1)
    parameters = [*model.parameters(), *(tensor for key, tensor in model.named_buffers() if "correction" in key)]
    with torch.no_grad():
        for tensor in parameters:
            tensor.add_(torch.randn(tensor.shape, generator=generator) * 0.1)
    return model


def save_and_read(model: Any, folder: Path) -> tuple[Config, dict[str, Tensor]]:
    """Shape and tensors as they are in the folder that transformers writes."""
    model.save_pretrained(folder)
    return load_config(folder), load_file(folder / "model.safetensors")


def read_model(folder: Path) -> GPT:
    """Our model of the folder that transformers wrote."""
    model = GPT(load_config(folder)).eval()
    load_model(model, folder)
    return model


def load_both(name: str, folder: Path) -> tuple[Any, GPT]:
    hf_model = build_reference(name)
    hf_model.save_pretrained(folder)
    return hf_model, read_model(folder)


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_transformers(name: str, tmp_path: Path) -> None:
    hf_model, model = load_both(name, tmp_path)
    ids = torch.randint(0, 96, (2, 100), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected, actual = hf_model(ids).logits, model(ids)
    assert expected.abs().max() > 0.2
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_rows_padded_on_the_left_equal_transformers(name: str, tmp_path: Path) -> None:
    hf_model, model = load_both(name, tmp_path)
    ids = torch.randint(0, 96, (2, 40), generator=torch.Generator().manual_seed(3))
    seen = torch.ones_like(ids)
    seen[0, :9] = 0
    positions = (seen.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        if name.startswith("llama4"):  # which counts padding in chunks and temperatures: compare without any
            expected = torch.cat(
                [hf_model(row[None, mask == 1]).logits[0] for row, mask in zip(ids, seen, strict=True)]
            )
        else:
            expected = hf_model(ids, attention_mask=seen, position_ids=positions).logits[seen == 1]
        actual = model(ids, positions_BT=positions, documents_BT=seen)
    torch.testing.assert_close(actual[seen == 1], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_export_is_exact_and_loads_in_transformers(name: str, tmp_path: Path) -> None:
    hf_model, model = load_both(name, tmp_path / "reference")
    save_model_folder(
        tmp_path / "exported", config=model.config, tensors=((k, v.detach()) for k, v in model.named_parameters())
    )
    tensors, exported = (load_file(tmp_path / folder / "model.safetensors") for folder in ("reference", "exported"))
    assert exported.keys() == tensors.keys()
    assert all(torch.equal(exported[key], tensors[key]) for key in tensors)
    loaded, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "exported", output_loading_info=True, dtype="float32", experts_implementation="eager",
        attn_implementation="eager",
    )  # fmt: skip
    assert type(loaded) is type(hf_model) and not any(report.values()), report
    ids = torch.arange(100)[None] % 96
    with torch.no_grad():
        assert torch.equal(loaded.eval()(ids).logits, hf_model(ids).logits)
    (tmp_path / "exported" / "model_config.yaml").unlink()
    assert Config.from_checkpoint(tmp_path / "exported").to_dict() == {**model.config.to_dict(), "name": "exported"}


@pytest.mark.parametrize("name", ["mixtral", "qwen2-moe-sparse", "deepseek-v2", "deepseek-v3", "gpt-oss", "llama4"])
def test_gradients_equal_transformers(name: str, tmp_path: Path) -> None:
    hf_model, model = load_both(name, tmp_path)
    ids = torch.randint(0, 96, (2, 40), generator=torch.Generator().manual_seed(2))
    hf_model.train()(ids).logits.logsumexp(-1).sum().backward()
    model.train()(ids).logsumexp(-1).sum().backward()
    for parameter in hf_model.parameters():  # saved as published names, like the weights themselves
        parameter.data = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
    _, gradients = save_and_read(hf_model, tmp_path / "gradients")
    expected = to_our_names(load_families()[hf_model.config.model_type].tensors, gradients, model.config)
    for key, parameter in model.named_parameters():
        if not key.endswith("correction"):
            assert parameter.grad is not None, key
            torch.testing.assert_close(
                parameter.grad, expected[key], atol=1e-4, rtol=1e-4, msg=lambda m, key=key: key + m
            )


def test_a_shifted_router_correction_changes_the_logits(tmp_path: Path) -> None:
    _, model = load_both("deepseek-v3", tmp_path)
    ids = torch.randint(0, 96, (2, 40), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        before = model(ids)
        for name, parameter in model.named_parameters():
            if name.endswith("correction"):
                parameter.copy_(parameter.roll(1))
        assert not torch.allclose(model(ids), before, atol=1e-3)


def test_layers_that_predict_further_tokens_are_left_unread(tmp_path: Path) -> None:
    config, tensors = save_and_read(build_reference("deepseek-v3"), tmp_path)
    more = {key.replace("layers.3.", "layers.4."): tensor for key, tensor in tensors.items() if "layers.3." in key}
    more |= {"model.layers.4.eh_proj.weight": torch.zeros(32, 64), "model.layers.4.enorm.weight": torch.zeros(32)}
    table = load_families()["deepseek_v3"].tensors
    assert {name for name in {**tensors, **more} if table.get_skip_reason(name, config) == NO_SUCH_PART} == set(more)
    assert to_our_names(table, {**tensors, **more}, config).keys() == to_our_names(table, tensors, config).keys()


NAMED = [name for family in load_families().values() for name in family.shapes if Config.from_name(name).n_expert]
PARAMETERS = {
    "Mixtral-8x7B-v0.1": 46_702_792_704,
    "Mixtral-8x22B-v0.1": 140_630_071_296,
    "Qwen1.5-MoE-A2.7B": 14_315_784_192,
    "Qwen3-30B-A3B": 30_532_122_624,
    "Qwen3-235B-A22B": 235_093_634_560,
    "OLMoE-1B-7B-0924": 6_919_161_856,
    "DeepSeek-V2-Lite": 15_706_484_224,
    "DeepSeek-V2": 235_741_434_880,
    "DeepSeek-V3": 671_026_419_200 + 11_610_068_224,  # with its prediction layer
    "gpt-oss-20b": 20_914_757_184,
    "gpt-oss-120b": 116_829_156_672,
}


@pytest.mark.parametrize("name", NAMED)
def test_a_named_shape_is_what_transformers_builds_of_its_config(name: str, tmp_path: Path) -> None:
    config = Config.from_name(name)
    family = find_family(config)
    assert family is not None and name in family.shapes
    (tmp_path / "config.json").write_text(json.dumps(family.config_json(config)))
    with torch.device("meta"):
        hf_model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(tmp_path))
        model = GPT(config)
    numbers = sum(tensor.numel() for tensor in model.parameters())
    corrections = sum(tensor.numel() for key, tensor in hf_model.named_buffers() if "correction" in key)
    predictions = sum(tensor.numel() for block in model.prediction_blocks for tensor in block.parameters())
    assert numbers == sum(tensor.numel() for tensor in hf_model.parameters()) + corrections + predictions
    assert numbers == PARAMETERS.get(name, numbers)
