"""References: held values, moves towards the policy, and a hash of all weights."""

import math
from typing import Any

import pytest
import torch

from litgpt import adapt
from litgpt.model.gpt import GPT
from litgpt.recipe.preference import PreferenceArgs
from litgpt.recipe.train import LossArgs
from litgpt.recipe.tuner import LoRA
from litgpt.train.preference import paired_answers
from litgpt.train.reference import Reference, copy_values, hash_parameters
from litgpt.train.step import train_step
from tests.store.models import random_model, small
from tests.train.pairs import build_model, build_state, collate, draw_answers

SHAPE = small("Llama-3.2-1B")


def fill(model: GPT, value: float) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)


def test_a_reference_moves_after_every_so_many_steps() -> None:
    model = random_model(SHAPE)
    fill(model, 1.0)
    reference = Reference(copy_values(model, ["norm.weight"]), sync_steps=2, mixup_alpha=0.25)
    fill(model, 3.0)
    means = []
    for step in range(6):
        reference.move(model, step)
        means.append(reference.values["norm.weight"].mean().item())
    assert means == [1.0, 1.0, 1.5, 1.5, 1.875, 1.875]  # before step 2: 0.25 x 3 + 0.75 x 1
    assert all(parameter.eq(3.0).all() for parameter in model.parameters())


def test_a_whole_move_makes_the_reference_the_policy() -> None:
    model = random_model(SHAPE)
    names = [name for name, _ in model.named_parameters()]
    reference = Reference(copy_values(random_model(SHAPE, seed=1), names), sync_steps=1, mixup_alpha=1.0)
    reference.move(model, 1)
    assert all(torch.equal(reference.values[name], parameter) for name, parameter in model.named_parameters())


def test_a_reference_without_moves_keeps_its_values() -> None:
    model = random_model(SHAPE)
    reference = Reference(copy_values(model, ["norm.weight"]))
    fill(model, 3.0)
    reference.move(model, 512)
    assert torch.equal(reference.values["norm.weight"], dict(random_model(SHAPE).named_parameters())["norm.weight"])


def test_the_hash_depends_on_every_value_and_type() -> None:
    model, hashes = random_model(SHAPE), set()
    hashes.add(hash_parameters(model))
    with torch.no_grad():
        model.blocks[1].norm_2.weight[3] += 1e-3  # type: ignore[index, operator, union-attr]
    hashes.add(hash_parameters(model))
    hashes.add(hash_parameters(model.double()))
    assert len(hashes) == 3
    assert hash_parameters(random_model(SHAPE)) in hashes


TUNERS: dict[str, LoRA | None] = {
    "full": None,
    "LoRA": LoRA(r=2, dropout=0.5, target_modules=["q"]),
    "bias all": LoRA(r=2, dropout=0.5, target_modules=["q", "down"], bias="all"),
}
LOSSES: dict[str, tuple[dict[str, Any], float]] = {
    "sigmoid": ({}, math.log(2)),
    "hinge": ({"loss_type": "hinge"}, 1.0),
    "ipo": ({"loss_type": "ipo"}, 1 / (4 * 0.1**2)),
}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("tuner", TUNERS)
def test_a_policy_that_is_its_reference_has_no_rewards(tuner: str, loss: str) -> None:
    model, settings = build_model(), TUNERS[tuner]
    if settings is not None:
        adapt.attach(model, settings)
        adapt.initialize_adapter(model, settings, 1)
    train_state = build_state(model)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    train_state.reference = Reference(copy_values(model, trained))
    answers = draw_answers(6)
    batches = [collate(answers[:4]), collate(answers[4:], packed=True)]
    preference, expected = LOSSES[loss]
    result = train_step(train_state, batches, paired_answers(PreferenceArgs(**preference), LossArgs()))
    assert result.loss == pytest.approx(expected, abs=1e-9)
    assert [result.metrics[f"rewards/{name}"] for name in ("chosen", "rejected", "margins")] == pytest.approx(
        [0.0] * 3, abs=1e-9
    )
