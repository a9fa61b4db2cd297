"""LoRA on stacked experts and routers: each expert has an update of its own, as if it were a layer of its own."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F

from litgpt import adapt
from litgpt.adapt.layers import disable_adapters
from litgpt.recipe.tuner import LoRA
from litgpt.store.adapters.folder import load_adapter_folder, save_adapter_folder
from tests.adapt.models import (
    IDS,
    build_adapted,
    build_merged,
    build_transformers_model,
    compute_loss,
    copy_base,
    perturb,
    train_steps,
)

MIXTRAL: dict[str, Any] = {"name": "Mixtral-8x7B-v0.1", "n_expert": 4, "sliding_window_size": None}
TARGETS = ["all-linear", "all-router"]


@pytest.mark.parametrize(
    "settings", [{}, {"init": "pissa", "rslora": True}, {"dora": True}, {"init": "olora", "dora": True}], ids=str
)
def test_merged_equals_adapted_and_disabled_equals_base(settings: dict[str, Any]) -> None:
    model = build_adapted(LoRA(r=4, dropout=0.0, target_modules=TARGETS, **settings), **MIXTRAL)
    base = copy_base(model)
    with disable_adapters(model):
        before = model(IDS)
    assert torch.allclose(model(IDS), before, atol=1e-5)
    perturb(model)
    assert (model(IDS) - before).abs().max() > 1e-2
    assert (build_merged(model)(IDS) - model(IDS)).abs().max() < 1e-9
    with disable_adapters(model):
        assert torch.equal(model(IDS), before)
    train_steps(model, lambda: model(IDS), 1)
    assert all(torch.equal(value, base[name]) for name, value in copy_base(model).items())


def test_gradients_equal_those_of_merged_weights() -> None:
    model = build_adapted(LoRA(r=4, dropout=0.0, target_modules=TARGETS), **MIXTRAL)
    perturb(model)
    compute_loss(model(IDS)).backward()
    whole = build_merged(model).requires_grad_(True)
    compute_loss(whole(IDS)).backward()
    weights, added = dict(whole.named_parameters()), adapt.get_adapter_parameters(model)
    for name in ("gate", "up", "down"):
        weight = weights[f"blocks.0.mlp.experts.{name}"].grad
        a, b = (added[f"blocks.0.mlp.experts.{name}_lora_{half}"] for half in "ab")
        assert weight is not None and a.grad is not None and b.grad is not None
        assert torch.allclose(b.grad, 8 * weight @ a.mT, atol=1e-12)
        assert torch.allclose(a.grad, 8 * b.mT @ weight, atol=1e-12)


def test_experts_with_biases() -> None:
    model = build_adapted(LoRA(r=4, dropout=0.0, target_modules=TARGETS), name="gpt-oss-20b", n_expert=4, n_layer=2)
    before = model(IDS)
    perturb(model)
    assert (model(IDS) - before).abs().max() > 1e-3
    assert (build_merged(model)(IDS) - model(IDS)).abs().max() < 1e-9


def test_dropout_drops_inputs_of_experts_only_in_training() -> None:
    model = build_adapted(LoRA(r=4, dropout=0.5, target_modules=["mlp.experts.gate"]), **MIXTRAL)
    perturb(model)
    assert torch.equal(model(IDS), model(IDS))
    model.train()
    assert not torch.equal(model(IDS), model(IDS))


def test_experts_compute_in_the_type_of_autocast() -> None:
    model = build_adapted(LoRA(r=4, dropout=0.0, target_modules=TARGETS), **MIXTRAL).float()
    perturb(model)
    with torch.autocast("cpu", torch.bfloat16):
        scores = model(IDS)
    compute_loss(scores.float()).backward()
    assert F.cosine_similarity(scores.flatten().float(), model(IDS).flatten(), dim=0) > 0.99
    assert all(value.grad is not None and value.grad.any() for value in adapt.get_adapter_parameters(model).values())


def test_experts_load_in_peft_and_back(tmp_path: Path) -> None:
    settings = LoRA(r=4, dropout=0.0)
    model = build_adapted(settings, **MIXTRAL).float()
    perturb(model)
    tensors = {name: value.detach() for name, value in adapt.get_adapter_parameters(model).items()}
    save_adapter_folder(tmp_path / "adapter", tensors, config=model.config, settings=settings)
    back = load_adapter_folder(tmp_path / "adapter", model.config)
    assert back.tensors.keys() == tensors.keys()
    assert all(torch.equal(back.tensors[name], value) for name, value in tensors.items())
    reference = peft.PeftModel.from_pretrained(build_transformers_model(model, tmp_path / "base"), tmp_path / "adapter")
    assert (reference.eval()(IDS).logits - model(IDS)).abs().max() < 1e-5
