"""Muon steps as torch's, on matrices, on each expert of a stack, and on shards of both."""

import pytest
import torch
from torch import Tensor, nn

from litgpt.parallel.apply import full_tensor
from litgpt.recipe.optimizer import Muon
from litgpt.train.muon import StackedMuon, orthogonalize
from litgpt.train.optimizer import build_optimizers
from tests.layouts.pool import POOL
from tests.store.models import small
from tests.train.layouts import LAYOUTS, build_model, train_on_drawn_gradients

SHAPE = small("Qwen3-30B-A3B", n_layer=2, n_expert=4, n_expert_per_token=2, moe_intermediate_size=24)
STEPS = 4


def draw(*shape: int, seed: int = 2) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def train(weight: Tensor, settings: Muon, *, as_torch: bool = False) -> Tensor:
    """The weight after some steps."""
    parameter = nn.Parameter(weight.clone())
    names = ("lr", "momentum", "nesterov", "weight_decay", "ns_steps", "adjust_lr_fn")
    given = {name: getattr(settings, name) for name in names}
    optimizer = torch.optim.Muon([parameter], **given) if as_torch else StackedMuon([parameter], settings)
    for step in range(STEPS):
        parameter.grad = draw(*weight.shape, seed=step)
        optimizer.step()
    return parameter.detach()


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (32, 32)])
@pytest.mark.parametrize("changes", [{}, {"nesterov": False, "momentum": 0.8}, {"adjust_lr_fn": "original"}], ids=str)
def test_steps_are_torch_s(shape: tuple[int, int], changes: dict[str, object]) -> None:
    settings = Muon(lr=1e-2, **changes)  # type: ignore[arg-type]
    torch.testing.assert_close(
        train(draw(*shape), settings), train(draw(*shape), settings, as_torch=True), atol=2e-4, rtol=0
    )


def test_singular_values_become_nearly_one() -> None:
    values = torch.linalg.svdvals(orthogonalize(draw(3, 24, 60).bfloat16(), steps=5).float())
    assert values.min() > 0.6 and values.max() < 1.3


def test_each_matrix_of_a_stack_is_orthogonalized() -> None:
    stack, settings = draw(3, 24, 40), Muon(lr=1e-2, momentum=0.0)
    trained = train(stack, settings)
    for number in range(3):
        parameter = nn.Parameter(stack[number].clone())
        optimizer = torch.optim.Muon([parameter], lr=1e-2, momentum=0.0, adjust_lr_fn="match_rms_adamw")
        for step in range(STEPS):
            parameter.grad = draw(3, 24, 40, seed=step)[number]
            optimizer.step()
        torch.testing.assert_close(trained[number], parameter.detach(), atol=2e-4, rtol=0)


def train_layout(layout: str) -> dict[str, Tensor]:
    """The full weights after some steps."""
    model = build_model(SHAPE, layout, "32-true", seed=1)
    optimizers = build_optimizers(Muon(lr=1e-2), model)
    train_on_drawn_gradients(model, optimizers, range(STEPS))
    return {name: full_tensor(parameter).detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(
    "layout", ["shards", "tensor", *(pytest.param(name, marks=pytest.mark.slow) for name in list(LAYOUTS)[3:])]
)
def test_shards_step_as_whole_matrices(layout: str) -> None:
    expected = train_layout("one")
    for result in POOL.run(train_layout, layout, ranks=LAYOUTS[layout][0]):
        assert result.keys() == expected.keys()
        for name, weight in expected.items():
            torch.testing.assert_close(result[name], weight, atol=1e-6, rtol=0, msg=lambda text, name=name: name + text)
