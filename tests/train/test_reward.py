"""The objective of reward models: loss, gradient and metrics against scores of one answer at a time, and TRL's."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from litgpt.data.stream.batch import Batch
from litgpt.model.gpt import GPT
from litgpt.model.init import initialize
from litgpt.recipe.preference import PreferenceArgs
from litgpt.train.evaluate import compute_validation_metrics
from litgpt.train.reward import pair_rewards
from litgpt.train.step import compute_gradients
from tests.train.pairs import SHAPE, Answer, build_state, collate, draw_answers

ANSWERS = draw_answers(4)
MARGINS = torch.tensor([0.0, 0.5, 2.0, -1.0], dtype=torch.float64)


def build_reward_model() -> GPT:
    model = GPT(replace(SHAPE, output="score"))
    initialize(model, seed=0)
    return model.double()


def cut(pairs: int, *, packed: bool, margins: Tensor = MARGINS, answers: list[Answer] = ANSWERS) -> list[Batch]:
    """Micro-batches of as many pairs."""
    return [
        collate(
            answers[2 * start : 2 * (start + pairs)],
            packed=packed,
            margin=margins[start : start + pairs].repeat_interleave(2),
        )
        for start in range(0, len(answers) // 2, pairs)
    ]


def train_once(batches: list[Batch], **settings: Any) -> tuple[float, Tensor, dict[str, float]]:
    """Loss, gradient and metrics of a global batch."""
    objective, model = pair_rewards(PreferenceArgs(loss_type="reward", **settings)), build_reward_model()
    sums = torch.zeros(2, len(objective.metrics), dtype=torch.float64)
    counts = objective.count_batches(batches)
    loss, _ = compute_gradients(build_state(model), batches, objective, counts=counts, metric_sums=sums)
    gradient = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    return loss, gradient, dict(zip(objective.metrics, (sums[0] / sums[1]).tolist(), strict=True))


def score_each(model: GPT) -> tuple[Tensor, Tensor]:
    """The scores of the chosen and of the rejected answers, at their last tokens."""
    scores = torch.stack([model(torch.tensor([answer.ids]))[0, -1, 0] for answer in ANSWERS])
    return scores[0::2], scores[1::2]


@pytest.mark.parametrize("coefficient", [None, 0.3])
@pytest.mark.parametrize(("pairs", "packed"), [(4, False), (2, True), (1, False), (1, True)])
def test_loss_and_gradient_are_those_of_the_formula(coefficient: float | None, pairs: int, packed: bool) -> None:
    loss, gradient, metrics = train_once(cut(pairs, packed=packed), center_rewards_coefficient=coefficient)
    model = build_reward_model()
    chosen, rejected = score_each(model)
    expected = -F.logsigmoid(chosen - rejected - MARGINS) + (coefficient or 0) * (chosen + rejected) ** 2
    expected.mean().backward()
    assert loss == pytest.approx(expected.mean().item(), rel=1e-12)
    torch.testing.assert_close(gradient, torch.cat([p.grad.flatten() for p in model.parameters()]), rtol=1e-9, atol=0)
    wanted = {
        "rewards/chosen": chosen.mean(),
        "rewards/rejected": rejected.mean(),
        "rewards/accuracies": (chosen > rejected).double().mean(),
        "rewards/margins": (chosen - rejected).mean(),
    }
    assert metrics == pytest.approx({name: value.item() for name, value in wanted.items()}, rel=1e-9)


def test_pairs_without_labels_count_nothing() -> None:
    batches = cut(2, packed=True)
    expected = train_once(cut(2, packed=True)[:1])
    loss, gradient, metrics = train_once([batches[0], batches[1].without_targets()])
    assert loss == pytest.approx(expected[0]) and metrics == pytest.approx(expected[2])
    torch.testing.assert_close(gradient, expected[1])


def test_validation_has_the_accuracy() -> None:
    model = build_reward_model()
    objective = pair_rewards(PreferenceArgs(loss_type="reward"))
    metrics = compute_validation_metrics(build_state(model), cut(2, packed=False), objective, max_iters=None)
    chosen, rejected = score_each(model)
    assert metrics["val_rewards/accuracies"] == (chosen > rejected).double().mean().item()
    assert metrics["val_loss"] == pytest.approx(-F.logsigmoid(chosen - rejected - MARGINS).mean().item(), rel=1e-9)
    assert "val_ppl" not in metrics
