"""KTO against its formula and TRL's numbers, however a batch is cut."""

from typing import Any

import pytest
import torch
from torch import Tensor

from litgpt.data.stream.batch import Batch
from litgpt.model.gpt import GPT
from litgpt.recipe.preference import PreferenceArgs
from litgpt.recipe.train import LossArgs
from litgpt.train.evaluate import compute_validation_metrics
from litgpt.train.kto import rate_answers, rated_answers
from litgpt.train.step import compute_gradients
from tests.train.pairs import Answer, build_model, build_state, collate, compute_token_log_probs, draw_answers

DESIRABLE = [True, False, False, True, True, False]


def cut(answers: list[Answer], samples: int, *, packed: bool) -> list[Batch]:
    """Micro-batches of as many samples: a rated answer and a mismatched one."""
    values = torch.tensor(DESIRABLE).float().repeat_interleave(2)
    parts = [slice(start, start + 2 * samples) for start in range(0, len(answers), 2 * samples)]
    return [collate(answers[part], packed=packed, desirable=values[part]) for part in parts]


def train_once(
    settings: dict[str, Any], batches: list[Batch], reference: GPT
) -> tuple[float, Tensor, dict[str, float]]:
    """Loss, gradient and metrics of a global batch."""
    objective = rated_answers(PreferenceArgs(loss_type="kto", **settings), LossArgs(chunk_rows=7))
    train_state = build_state(build_model(0), reference)
    sums = torch.zeros(2, len(objective.metrics), dtype=torch.float64)
    counts = objective.count_batches(batches)
    prepared = objective.prepare(train_state, batches)
    value, _ = compute_gradients(train_state, prepared, objective, counts=counts, metric_sums=sums)
    gradient = torch.cat([parameter.grad.flatten() for parameter in train_state.parameters()])
    return value, gradient, objective.compute_metrics(sums.flatten().tolist())


def compute_expected(settings: dict[str, Any], answers: list[Answer], reference: GPT) -> tuple[float, Tensor, float]:
    """Loss, gradient and KL by the formulas of the paper."""
    model, preference = build_model(0), PreferenceArgs(loss_type="kto", **settings)
    scores = torch.stack([compute_token_log_probs(model, answer)[0].sum() for answer in answers])
    with torch.no_grad():
        others = torch.stack([compute_token_log_probs(reference, answer)[0].sum() for answer in answers])
    ratios = scores - others
    kl = ratios[1::2].mean().detach().clamp(min=0)
    losses = []
    for ratio, desirable in zip(ratios[::2], DESIRABLE, strict=True):
        weight = preference.desirable_weight if desirable else preference.undesirable_weight
        sign = 1 if desirable else -1
        losses.append(weight * (1 - torch.sigmoid(sign * preference.resolved_beta * (ratio - kl))))
    loss = torch.stack(losses).mean()
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])
    return loss.item(), gradient, kl.item()


@pytest.mark.parametrize(("seed", "is_limited"), [(0, True), (2, False), (5, False)])
@pytest.mark.parametrize("settings", [{}, {"beta": 0.4, "desirable_weight": 1.25, "undesirable_weight": 0.5}])
def test_loss_gradient_and_kl_are_those_of_the_formula(settings: dict[str, Any], seed: int, is_limited: bool) -> None:
    answers, other = draw_answers(len(DESIRABLE), seed=seed), build_model(1)
    expected, wanted, kl = compute_expected(settings, answers, other)
    assert (kl == 0) == is_limited
    for samples, packed in [(6, False), (6, True), (3, False), (2, True), (1, False)]:
        loss, gradient, metrics = train_once(settings, cut(answers, samples, packed=packed), other)
        assert loss == pytest.approx(expected, rel=1e-10)
        assert metrics["kl"] == pytest.approx(kl, rel=1e-10)
        torch.testing.assert_close(gradient, wanted, rtol=1e-8, atol=1e-10)


def test_the_loss_and_rewards_where_the_reference_is_the_policy() -> None:
    loss, _, metrics = train_once({}, cut(draw_answers(6), 2, packed=True), build_model(0))
    assert loss == pytest.approx(0.5, rel=1e-12)
    assert [metrics[name] for name in ("rewards/chosen", "rewards/rejected", "kl")] == [0.0] * 3


def test_metrics_are_those_of_desirable_and_undesirable_answers() -> None:
    answers, reference, policy = draw_answers(6, seed=2), build_model(3), build_model(0)
    _, _, metrics = train_once({"beta": 0.2}, cut(answers, 3, packed=False), reference)
    desirable = torch.tensor(DESIRABLE)
    with torch.no_grad():
        values = [compute_token_log_probs(policy, answer) for answer in answers[::2]]
        scores = torch.stack([log_probs.sum() for log_probs, _, _ in values])
        others = torch.stack([compute_token_log_probs(reference, answer)[0].sum() for answer in answers[::2]])
    rewards = 0.2 * (scores - others)
    logits = [mean for _, _, mean in values]
    expected = {
        "rewards/chosen": rewards[desirable].mean(),
        "rewards/rejected": rewards[~desirable].mean(),
        "rewards/margins": rewards[desirable].mean() - rewards[~desirable].mean(),
        "rewards/accuracies": ((rewards > 0.2 * metrics["kl"]) == desirable).double().mean(),
        "logps/chosen": scores[desirable].mean(),
        "logps/rejected": scores[~desirable].mean(),
        "logits/chosen": torch.cat([mean for mean, good in zip(logits, DESIRABLE, strict=True) if good]).mean(),
        "logits/rejected": torch.cat([mean for mean, good in zip(logits, DESIRABLE, strict=True) if not good]).mean(),
        "nll_loss": -torch.cat([v[0] for v, good in zip(values, DESIRABLE, strict=True) if good]).mean(),
    }
    assert metrics.pop("kl") > 0
    assert metrics == pytest.approx({name: value.item() for name, value in expected.items()}, rel=1e-10)


def test_margins_need_answers_of_both_kinds() -> None:
    answers, reference = draw_answers(1, seed=2), build_model(3)  # a desirable one
    _, _, metrics = train_once({}, cut(answers, 1, packed=False), reference)
    assert "rewards/chosen" in metrics and not {"rewards/rejected", "rewards/margins"} & set(metrics)


def test_samples_without_labels_count_nothing() -> None:
    answers, reference = draw_answers(6, seed=2), build_model(3)
    batches = cut(answers, 3, packed=True)
    loss, wanted, metrics = train_once({}, batches, reference)
    other, gradient, others = train_once({}, [batches[0], batches[0].without_targets(), batches[1]], reference)
    assert other == pytest.approx(loss, rel=1e-12)
    torch.testing.assert_close(gradient, wanted)
    assert others == pytest.approx(metrics, rel=1e-10)


def test_validation_estimates_the_divergence_of_each_micro_batch() -> None:
    answers, reference = draw_answers(6, seed=2), build_model(3)
    objective = rated_answers(PreferenceArgs(loss_type="kto"), LossArgs())
    loss, _, metrics = train_once({}, cut(answers, 6, packed=False), reference)
    train_state = build_state(build_model(0), reference)
    whole = compute_validation_metrics(train_state, cut(answers, 6, packed=True), objective, max_iters=None)
    assert whole.pop("val_loss") == pytest.approx(loss, rel=1e-10)
    assert whole == pytest.approx({f"val_{name}": value for name, value in metrics.items()}, rel=1e-10)


@pytest.mark.parametrize(
    ("kl", "expected"),
    # the loss of the paper for log-ratios 1.5, -2.5, 0.5 and 5, the first two desirable, with weights 1.2 and 0.7
    [(0.0, [0.555084, 0.674611, 0.358748, 0.435722]), (2.0, [0.614997, 0.732767, 0.323799, 0.40211])],
)
def test_frozen_numbers(kl: float, expected: list[float]) -> None:
    scores, reference = torch.tensor([-12.0, -31.5, -9.0, -21.0]), torch.tensor([-13.5, -29.0, -9.5, -26.0])
    values = {
        "length": torch.ones(4),
        "desirable": torch.tensor([1.0, 1.0, 0.0, 0.0]),
        "reference": reference,
        "kl": torch.full((4,), kl),
    }
    settings = PreferenceArgs(loss_type="kto", desirable_weight=1.2, undesirable_weight=0.7)
    losses, _ = rate_answers(values, scores, settings)
    torch.testing.assert_close(losses, torch.tensor(expected), rtol=1e-5, atol=2e-6)
