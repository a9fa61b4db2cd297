"""References: held values, moves towards the policy, and a hash of all weights."""

import torch

from litgpt.model.gpt import GPT
from litgpt.train.reference import Reference, copy_values, hash_parameters
from tests.store.models import random_model, small

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
