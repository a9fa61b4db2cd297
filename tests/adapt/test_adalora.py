"""AdaLoRA: losses, singular values and pruned ranks equal PEFT's; pruned adapters of PEFT are read."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from litgpt import adapt
from litgpt.adapt.adalora import IMPORTANCE, MASK, AdaLoRALinear, RankSchedule, compute_orthogonality_gradient
from litgpt.adapt.layers import iter_adapted_layers
from litgpt.errors import UserError
from litgpt.model.gpt import GPT
from litgpt.model.init import copy_into
from litgpt.recipe.tuner import AdaLoRA
from litgpt.store.adapters.folder import load_adapter_folder
from tests.adapt.models import (
    IDS,
    build_adapted,
    build_transformers_model,
    compute_loss,
    copy_base,
    map_published_modules,
    perturb,
)
from tests.store.models import random_model

STEPS = 8
SETTINGS = AdaLoRA(
    init_r=4, target_r=2, dropout=0.0, tinit=1, tfinal=2, delta_t=2, orth_reg_weight=0.3, target_modules=["q", "down"]
)


def train_ours(model: GPT, settings: AdaLoRA = SETTINGS, steps: int = STEPS, count: int = STEPS) -> list[Any]:
    """The losses and singular values of each step; the optimizer last."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, eps=1e-5)
    schedule = adapt.build_schedule(model, settings, 0, steps)
    assert isinstance(schedule, RankSchedule)
    history: list[Any] = []
    for step in range(count):
        assert schedule.begin_step(step) == []
        loss = compute_loss(model(IDS))
        loss.backward()
        schedule.add_gradients(copy_into)
        optimizer.step()
        schedule.end_step([optimizer], copy_into)
        optimizer.zero_grad()
        values = [p.detach().clone() for name, p in model.named_parameters() if name.endswith("lora_e")]
        history.append((loss.item(), torch.stack(values)))
    return [*history, optimizer]


def test_training_and_pruning_equal_peft(tmp_path: Path) -> None:
    model = build_adapted(SETTINGS)
    perturb(model)
    base = copy_base(model)
    config = peft.AdaLoraConfig(
        **{"init_r": 4, "target_r": 2, "lora_alpha": 32, "lora_dropout": 0.0, "tinit": 1, "tfinal": 2, "deltaT": 2},
        **{"orth_reg_weight": 0.3, "total_step": STEPS, "target_modules": ["q_proj", "down_proj"]},
        task_type="CAUSAL_LM",
    )
    reference = peft.get_peft_model(build_transformers_model(model, tmp_path / "base"), config).double()
    modules, theirs = map_published_modules(model), dict(reference.named_parameters())
    pairs = []
    for name, value in adapt.get_adapter_parameters(model).items():
        owner, _, key = name.rpartition(".")
        half = f"{key[:-1]}{key[-1].upper()}"
        pairs.append((value, theirs[f"base_model.model.{modules[owner]}.{half}.default"]))
        pairs[-1][1].data.copy_(value.detach().view_as(pairs[-1][1]))
    *ours, _ = train_ours(model)
    optimizer = torch.optim.AdamW([p for p in reference.parameters() if p.requires_grad], lr=1e-2, eps=1e-5)
    ranks = []
    for step in range(STEPS):
        result = reference(IDS, labels=IDS)
        result.loss.backward()  # with that of the orthogonality
        optimizer.step()
        reference.base_model.update_and_allocate(step)
        optimizer.zero_grad()
        expected = torch.stack([p.detach().flatten() for name, p in theirs.items() if "lora_E" in name])
        assert ours[step][0] == pytest.approx(compute_loss(result.logits).item(), abs=1e-5)
        assert torch.allclose(ours[step][1], expected, atol=1e-5)
        ranks.append(int(expected.ne(0).sum()))
        assert int(ours[step][1].ne(0).sum()) == ranks[-1]
    assert ranks[0] == 16 and ranks[-2:] == [8, 8] and len(set(ranks)) > 2
    for value, expected in pairs:
        assert torch.allclose(value, expected.view_as(value), atol=1e-4)
    assert all(torch.equal(value, base[name]) for name, value in copy_base(model).items())
    reference.save_pretrained(tmp_path / "adapter")  # without the pruned ranks
    adapter = load_adapter_folder(tmp_path / "adapter", model.config)
    other = random_model(model.config).double()
    other.load_state_dict(base)
    adapt.attach(other, adapter.settings)
    adapt.load_adapter(other.float(), adapter.tensors)
    assert (other(IDS) - reference.eval()(IDS).logits).abs().max() < 1e-4


def test_the_gradient_of_the_orthogonality_is_that_of_autograd() -> None:
    rows = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    torch.linalg.matrix_norm(rows @ rows.mT - torch.eye(3, dtype=torch.float64)).backward()
    assert torch.allclose(compute_orthogonality_gradient(rows.detach()), rows.grad, atol=1e-12)  # type: ignore[arg-type]
    exact = torch.eye(3, 7)
    assert torch.equal(compute_orthogonality_gradient(exact), torch.zeros(3, 7))


def test_ranks_stay_after_a_checkpoint_without_optimizer_state() -> None:
    model = build_adapted(SETTINGS)
    train_ours(model, count=5)
    schedule = RankSchedule(model, SETTINGS, STEPS)
    kept = [layer.e.ne(0) for layer in schedule.layers]
    assert 8 <= sum(int(layer.sum()) for layer in kept) < 16
    optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    for step in (6, 7):
        schedule.begin_step(step)
        schedule.end_step([optimizer], copy_into)
    assert all(torch.equal(layer.e.ne(0), was) for layer, was in zip(schedule.layers, kept, strict=True))


def test_means_are_kept_until_the_ranks_are_final() -> None:
    model = build_adapted(SETTINGS)
    *_, optimizer = train_ours(model, count=4)
    layers = [layer for _, layer in iter_adapted_layers(model) if isinstance(layer, AdaLoRALinear)]
    assert all(IMPORTANCE in optimizer.state[layer.lora_a] for layer in layers)
    model = build_adapted(SETTINGS)
    *_, optimizer = train_ours(model)
    layers = [layer for _, layer in iter_adapted_layers(model) if isinstance(layer, AdaLoRALinear)]
    assert not any(IMPORTANCE in optimizer.state[layer.lora_a] for layer in layers)
    assert sum(int(optimizer.state[layer.lora_e][MASK].sum()) for layer in layers) == 8


@pytest.mark.parametrize(
    ("settings", "steps", "message"),
    [
        ({}, None, "tuner: AdaLoRA allocates ranks over a number of steps; set tuner.total_steps"),
        ({"tinit": 5, "tfinal": 5}, 10, "tuner.tinit: 5 and tuner.tfinal: 5 leave none of 10 steps"),
        ({"target_r": 9, "init_r": 8}, 10, "tuner.target_r: 9 is more than tuner.init_r; set at most 8"),
    ],
)
def test_a_schedule_without_an_allocation_is_refused(settings: dict[str, Any], steps: int | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        adapt.build_schedule(build_adapted(AdaLoRA(**settings)), AdaLoRA(**settings), 0, steps)
