"""LoRA-GA: factors are singular vectors of the gradient of the weights, which is that of plain backpropagation."""

import pytest
import torch

from litgpt.adapt.layers import own_parameter
from litgpt.adapt.lora import init_lora_ga
from litgpt.data.stream.batch import Batch
from litgpt.errors import UserError
from litgpt.model.gpt import GPT
from litgpt.parallel.precision import PRECISIONS
from litgpt.recipe.train import LossArgs
from litgpt.recipe.tuner import LoRA
from litgpt.train.gradient_init import compute_weight_gradients, initialize_from_batches, list_targets
from litgpt.train.objective import next_token
from litgpt.train.train_state import TrainState
from tests.adapt.models import IDS, build_adapted, build_merged, compute_loss, copy_base

CPU = torch.device("cpu")
SETTINGS = LoRA(r=3, alpha=6, dropout=0.0, init="lora_ga", target_modules=["q", "down"])
LABELS = torch.cat([IDS[:, 1:], torch.full_like(IDS[:, :1], -100)], 1)
BATCHES = [Batch(IDS[:1], LABELS[:1]), Batch(IDS[1:], LABELS[1:])]


def build_state(settings: LoRA = SETTINGS) -> tuple[GPT, TrainState]:
    model = build_adapted(settings)
    return model, TrainState(model, [], CPU, PRECISIONS["64-true"])


def test_gradients_are_those_of_the_base_and_nothing_else_changes() -> None:
    model, state = build_state()
    before, trained = copy_base(model), {name for name, p in model.named_parameters() if p.requires_grad}
    plain = build_merged(model)
    compute_loss(plain(IDS)).backward()
    targets = compute_weight_gradients(state, next_token(LossArgs()), BATCHES)
    expected = {name: p.grad for name, p in plain.named_parameters() if name.endswith((".q.weight", ".down.weight"))}
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert len(targets) == 4 and gradients.keys() == expected.keys()
    assert all(torch.allclose(gradients[name], value, atol=1e-10) for name, value in expected.items())  # type: ignore[arg-type]
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trained
    assert all(torch.equal(value, before[name]) for name, value in copy_base(model).items())


def test_the_update_starts_at_zero_and_its_first_step_follows_the_gradient() -> None:
    model, state = build_state()
    wanted = model(IDS)
    initialize_from_batches(state, next_token(LossArgs()), BATCHES, SETTINGS)
    assert torch.allclose(model(IDS), wanted, atol=1e-10)
    layer, _, weight = list_targets(model)[0]
    a, b = (own_parameter(layer, f"lora_{key}").detach() for key in "ab")
    assert torch.equal(a, own_parameter(layer, "lora_a_first")) and torch.equal(b, own_parameter(layer, "lora_b_first"))
    scale = 32**0.25 / 16**0.5
    for factor in (a / scale, b.mT / scale):
        assert torch.allclose(factor @ factor.mT, torch.eye(3, dtype=torch.float64), atol=1e-6)
    compute_weight_gradients(state, next_token(LossArgs()), BATCHES)
    gradient = weight.grad
    assert gradient is not None
    # the first step of gradient descent changes B A along s (G A^T A + B B^T G), of which 2 r directions are those of G
    change = gradient @ a.mT @ a + b @ b.mT @ gradient
    values = torch.linalg.svdvals(gradient)
    kept = (change * gradient).sum() / (change.norm() * gradient.norm())
    assert kept.item() == pytest.approx((values[:6].norm() / values.norm()).item(), abs=1e-6)


@pytest.mark.parametrize("direction", ["ArBr", "A2rBr", "ArB2r"])
def test_the_directions_are_those_of_the_paper(direction: str) -> None:
    gradient = torch.randn(10, 8, dtype=torch.float64)
    settings = LoRA(r=3, init="lora_ga", ga_direction=direction, ga_scale="unit")  # type: ignore[arg-type]
    u, values, v = torch.linalg.svd(gradient, full_matrices=False)
    a, b = init_lora_ga(gradient, settings)
    of_a = {"ArBr": [1, 3, 5], "A2rBr": [3, 4, 5], "ArB2r": [0, 1, 2]}[direction]
    of_b = sorted(set(range(6)) - set(of_a))
    assert torch.allclose((a @ v.mT).abs()[:, of_a], torch.eye(3, dtype=torch.float64), atol=1e-9)
    assert torch.allclose((u.mT @ b).abs()[of_b], torch.eye(3, dtype=torch.float64), atol=1e-9)
    assert len(values) == 8


def test_more_ranks_than_half_of_a_matrix_are_refused() -> None:
    with pytest.raises(UserError, match=r"tuner.r: 17 is more than the 16 that .* has for lora_ga"):
        build_state(LoRA(r=17, init="lora_ga"))
