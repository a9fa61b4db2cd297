"""LoRA and its variants compute and train as PEFT's do."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from litgpt import adapt
from litgpt.adapt.layers import disable_adapters
from litgpt.adapt.lora import lora_down
from litgpt.model.gpt import GPT
from litgpt.recipe.tuner import LoRA
from tests.adapt.models import (
    IDS,
    build_adapted,
    build_merged,
    build_transformers_model,
    compute_loss,
    copy_base,
    map_published_modules,
    perturb,
    train_steps,
)

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
KEYS = {"lora_a": "lora_A.default.weight", "lora_b": "lora_B.default.weight"}
KEYS["lora_magnitude"] = "lora_magnitude_vector.default.weight"
# our settings, and what PEFT is told in addition
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "default": ({}, {}),
    "gaussian": ({"init": "gaussian"}, {"init_lora_weights": "gaussian"}),
    "rslora": ({"rslora": True}, {"use_rslora": True}),
    "dora": ({"dora": True}, {"use_dora": True}),
    "pissa": ({"init": "pissa"}, {"init_lora_weights": "pissa"}),
    "olora": ({"init": "olora"}, {"init_lora_weights": "olora"}),
    "bias": ({"bias": "all"}, {"bias": "all"}),
    "saved": ({"modules_to_save": ["norm", "embed_tokens"]}, {"modules_to_save": ["model.norm", "embed_tokens"]}),
    "some": ({"target_modules": ["q", "attention.v"]}, {"target_modules": ["q_proj", "v_proj"]}),
    "head": ({"target_modules": ["head", "down_proj"]}, {"target_modules": ["lm_head", "down_proj"]}),
    "regex": (
        {"target_regex": r"blocks\.1\.mlp\..*"},
        {"target_modules": r"model\.layers\.1\.mlp\.(gate|up|down)_proj"},
    ),
}


def in_peft(name: str, modules: dict[str, str]) -> str:
    """The name in PEFT of a parameter of our adapter."""
    owner, _, key = name.rpartition(".")
    if key in KEYS:
        return f"base_model.model.{modules[owner]}.{KEYS[key]}"
    if key == "bias_trained":
        layer = "" if owner.endswith(("norm_1", "norm_2")) or owner == "norm" else "base_layer."
        return f"base_model.model.{modules[owner]}.{layer}bias"
    return f"base_model.model.{modules[owner]}.modules_to_save.default.weight"


def build_pair(case: str, folder: Path) -> tuple[GPT, Any, dict[str, str]]:
    """Our model, PEFT's with the same numbers, and the names of our adapter's parameters there."""
    settings, peft_settings = CASES[case]
    model = build_adapted(LoRA(r=4, alpha=12, dropout=0.0, **settings), tie_embeddings=False)
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 12, "target_modules": ALL, **peft_settings})
    reference = peft.get_peft_model(build_transformers_model(model, folder / "base"), config).double()
    names = {
        name: in_peft(name, map_published_modules(model))
        for name, value in adapt.get_adapter_parameters(model).items()
        if value.requires_grad
    }
    trained = {name: value for name, value in reference.named_parameters() if value.requires_grad}
    assert sorted(names.values()) == sorted(trained)
    if "init" not in settings:
        perturb(model)
        with torch.no_grad():
            for name, peft_name in names.items():
                trained[peft_name].copy_(dict(model.named_parameters())[name])
    return model, reference, names


def max_difference(model: GPT, reference: Any, names: dict[str, str], what: str) -> float:
    """The largest difference of values or gradients, relative to the largest of each tensor."""
    parameters, peft_parameters = dict(model.named_parameters()), dict(reference.named_parameters())

    def difference(name: str) -> float:
        value, expected = (
            t.grad if what == "grad" else t.detach() for t in (parameters[name], peft_parameters[names[name]])
        )
        return float((value - expected).abs().max() / expected.abs().max().clamp(min=1e-9))

    return max(map(difference, names))


@pytest.mark.parametrize("case", [name for name in CASES if name not in ("default", "gaussian")])
def test_forward_gradients_and_steps_equal_peft(case: str, tmp_path: Path) -> None:
    model, reference, names = build_pair(case, tmp_path)
    base = copy_base(model)
    assert (model(IDS) - reference(IDS).logits).abs().max() < 1e-5
    compute_loss(model(IDS)).backward()
    compute_loss(reference(IDS).logits).backward()
    assert max_difference(model, reference, names, "grad") < 1e-5
    losses = train_steps(model, lambda: model(IDS), 5)
    peft_losses = train_steps(reference, lambda: reference(IDS).logits, 5)
    assert losses[-1] < losses[0]
    assert losses == pytest.approx(peft_losses, abs=1e-5)
    assert max_difference(model, reference, names, "value") < 1e-4
    assert all(torch.equal(value, base[name]) for name, value in copy_base(model).items())


@pytest.mark.parametrize("case", ["default", "gaussian", "pissa", "olora"])
def test_initialization_keeps_the_output_and_equals_peft(case: str, tmp_path: Path) -> None:
    settings = LoRA(r=4, alpha=12, **CASES[case][0])
    model = build_adapted(settings)
    with disable_adapters(model):
        before = model(IDS)
    assert torch.equal(model.eval()(IDS), before)
    config = peft.LoraConfig(r=4, lora_alpha=12, target_modules=ALL, **CASES[case][1])
    reference = dict(peft.get_peft_model(build_transformers_model(model, tmp_path / "base"), config).named_parameters())
    for name, value in adapt.get_adapter_parameters(model).items():
        if value.requires_grad:
            other = reference[in_peft(name, map_published_modules(model))]
            if case in ("pissa", "olora"):
                assert torch.allclose(value, other.double(), atol=1e-5), name
            else:
                assert value.std().item() == pytest.approx(other.std().item(), rel=0.25), name


@pytest.mark.parametrize("case", CASES)
def test_merged_equals_adapted_and_disabled_equals_base(case: str) -> None:
    settings = LoRA(r=4, alpha=12, dropout=0.3, **CASES[case][0])
    model = build_adapted(settings, tie_embeddings=False).float()
    with disable_adapters(model):
        base = model(IDS)
    perturb(model)
    adapter = model(IDS)
    assert (adapter - base).abs().max() > 1e-2
    assert (build_merged(model)(IDS) - adapter).abs().max() < 1e-6 * max(1.0, adapter.abs().max().item())
    with disable_adapters(model):
        assert torch.equal(model(IDS), base)
    assert not torch.equal(model.train()(IDS), adapter)  # dropout


def test_tied_embedding_stays_tied_when_its_copy_or_the_head_is_adapted() -> None:
    for settings in (LoRA(modules_to_save=["embedding"]), LoRA(target_modules=["lm_head"])):
        model = build_adapted(settings, tie_embeddings=True)
        perturb(model)
        merged: dict[str, Tensor] = dict(adapt.merge_adapter(model))
        assert "head.weight" not in merged
        assert torch.equal(merged["embedding.weight"], model.output_weight)
        assert not torch.equal(merged["embedding.weight"], dict(model.named_parameters())["embedding.weight"])
        assert (build_merged(model)(IDS) - model(IDS)).abs().max() < 1e-9


def test_only_added_parameters_are_trained_and_in_the_optimizer() -> None:
    model = build_adapted(LoRA(target_modules=["q"], dropout=0.0))
    trained = {name for name, value in model.named_parameters() if value.requires_grad}
    assert trained == {f"blocks.{layer}.attention.q.lora_{part}" for layer in range(2) for part in "ab"}
    compute_loss(model(IDS)).backward()
    assert {name for name, value in model.named_parameters() if value.grad is not None} == trained


def test_initial_values_depend_only_on_seed_and_name() -> None:
    model, again, other_targets = (
        build_adapted(LoRA(target_modules=targets)) for targets in (["q"], ["q"], ["q", "k"])
    )
    name = "blocks.1.attention.q.lora_a"
    values = [adapt.get_adapter_parameters(model)[name] for model in (model, again, other_targets)]
    assert torch.equal(values[0], values[1]) and torch.equal(values[0], values[2])
    adapt.initialize_adapter(again, LoRA(), 1)
    assert not torch.equal(values[0], adapt.get_adapter_parameters(again)[name])
    assert not torch.equal(values[0], adapt.get_adapter_parameters(model)["blocks.0.attention.q.lora_a"])


def test_lora_plus_multiplies_the_learning_rate_of_b_only() -> None:
    settings = LoRA(lora_plus=16)
    factors = {name: settings.get_lr_multiplier(name) for name in adapt.get_adapter_parameters(build_adapted(settings))}
    assert {name.rpartition(".")[2]: factor for name, factor in factors.items()} == {"lora_a": 1.0, "lora_b": 16.0}


def test_autocast_computes_in_bfloat16_near_the_exact_result() -> None:
    model = build_adapted(LoRA(dropout=0.0, dora=True)).float()
    perturb(model)
    expected = model(IDS)
    with torch.autocast("cpu", torch.bfloat16):
        scores = model(IDS)
    compute_loss(scores.float()).backward()
    assert 0 < (scores - expected).abs().max() < 0.1 * expected.abs().max()
    gradients = [value.grad for value in adapt.get_adapter_parameters(model).values()]
    assert all(gradient is not None and gradient.isfinite().all() and gradient.any() for gradient in gradients)


@pytest.mark.parametrize("needs_grad", [True, False])
def test_dropout_equals_torch_and_saves_one_byte_per_input(needs_grad: bool) -> None:
    x, a, slope = (torch.randn(size, dtype=torch.float64) for size in ((2, 5, 16), (4, 16), (2, 5, 4)))
    results = []
    for way in (lambda: F.linear(F.dropout(x, 0.3), a), lambda: lora_down(x, a, 0.3)):
        kept: list[Tensor] = []
        x.requires_grad_(needs_grad).grad, a.requires_grad_().grad = None, None
        torch.manual_seed(1)
        with torch.autograd.graph.saved_tensors_hooks(lambda x, kept=kept: kept.append(x) or x, lambda x: x):
            y = way()
        y.backward(slope)
        results.append([y, a.grad, *([x.grad] if needs_grad else [])])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))
    assert {saved.data_ptr() for saved in kept if saved.dtype != torch.bool} == {x.data_ptr(), a.data_ptr()}
