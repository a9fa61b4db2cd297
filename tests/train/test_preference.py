"""The objective of pairs: loss, gradients and metrics against scores from all logits, however a batch is cut."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from litgpt.data.stream.batch import Batch
from litgpt.model.gpt import GPT
from litgpt.parallel.precision import PRECISIONS
from litgpt.recipe.preference import PreferenceArgs
from litgpt.recipe.train import LossArgs
from litgpt.train.answer_scores import AnswerScorer
from litgpt.train.evaluate import compute_validation_metrics
from litgpt.train.objective import Objective
from litgpt.train.preference import paired_answers
from litgpt.train.preference_losses import PAIR_LOSSES, PairScores, compute_pair_losses
from litgpt.train.step import compute_gradients
from tests.train.pairs import Answer, build_model, build_state, collate, compute_token_log_probs, draw_answers

SORTED = {"aot", "aot_unpaired"}
SMOOTHED: dict[str, dict[str, Any]] = {"exo_pair": {"label_smoothing": 0.001}}
CHUNKED = LossArgs(chunk_rows=7)


def cut(answers: list[Answer], pairs: int, *, packed: bool) -> list[Batch]:
    """Micro-batches of as many pairs."""
    starts = range(0, len(answers), 2 * pairs)
    return [collate(answers[start : start + 2 * pairs], packed=packed) for start in starts]


def train_once(
    settings: dict[str, Any], batches: list[Batch], *, reference: GPT | None = None, loss: LossArgs = CHUNKED
) -> tuple[float, Tensor, dict[str, float]]:
    """Loss, gradient and metrics of a global batch."""
    objective = paired_answers(PreferenceArgs(**settings), loss)
    model = build_model(0)
    train_state = build_state(model, reference)
    sums = torch.zeros(2, len(objective.metrics), dtype=torch.float64)
    counts = objective.count_batches(batches)
    prepared = objective.prepare(train_state, batches)
    value, _ = compute_gradients(train_state, prepared, objective, counts=counts, metric_sums=sums)
    gradient = torch.cat([parameter.grad.flatten() for parameter in train_state.parameters()])
    return value, gradient, dict(zip(objective.metrics, (sums[0] / sums[1]).tolist(), strict=True))


def compute_expected(settings: dict[str, Any], answers: list[Answer], reference: GPT) -> tuple[float, Tensor]:
    """Loss and gradient by the formulas, from the logits of one answer at a time."""
    model, preference = build_model(0), PreferenceArgs(**settings)

    def score(model: GPT) -> tuple[Tensor, list[Tensor], Tensor]:
        totals, nlls, aligned = [], [], []
        for number, answer in enumerate(answers):
            log_probs, log_squares, _ = compute_token_log_probs(model, answer)
            weights = torch.tensor([weight for weight in answer.weights[1:] if weight], dtype=torch.float64)
            other = sum(weight > 0 for weight in answers[number ^ 1].weights)
            decay = torch.ones_like(weights)
            decay[other:] = 1.0 if preference.ld_alpha is None else preference.ld_alpha
            totals.append((decay * weights * log_probs).sum())
            nlls.append(-weights * log_probs)
            aligned.append((log_probs - log_squares).mean().detach())
        return torch.stack(totals), nlls, torch.stack(aligned)

    scores, nlls, aligned = score(model)
    with torch.no_grad():
        others = score(reference)[0] if preference.needs_reference else torch.zeros_like(scores)
    lengths = torch.tensor([len(nll) for nll in nlls], dtype=torch.float64)
    losses = compute_pair_losses(
        PairScores(*(column for values in (scores, others, lengths) for column in values.view(-1, 2).unbind(1))),
        preference,
    )
    if preference.use_weighting:
        losses = losses * aligned.view(-1, 2).sum(1).exp()
    chosen = torch.cat(nlls[::2])
    loss = losses.mean() + preference.nll_weight * chosen.mean()
    return loss.item(), torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


EXAMPLES: list[dict[str, Any]] = [
    {"loss_type": "sigmoid", "beta": 0.3},
    {"loss_type": "ipo", "f_divergence_type": "alpha_divergence"},
    {"loss_type": "sigmoid", "ld_alpha": 0.5, "rpo_alpha": 0.5},
    {"loss_type": "sigmoid_norm", "ld_alpha": 0.0},
    {"loss_type": "hinge", "use_weighting": True},
    {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0], "use_weighting": True},
    {"loss_type": "sigmoid", "reference_free": True},
    {"loss_type": "sft"},
    {"loss_type": "orpo"},
    {"loss_type": "cpo", "cpo_alpha": 0.5},
    {"loss_type": "simpo", "use_weighting": True},
]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("settings", EXAMPLES)
def test_loss_and_gradient_are_those_of_the_formulas(settings: dict[str, Any], weighted: bool, packed: bool) -> None:
    answers, reference = draw_answers(4, weighted=weighted), build_model(1)
    expected, wanted = compute_expected(settings, answers, reference)
    loss, gradient, _ = train_once(settings, cut(answers, 2, packed=packed), reference=reference)
    tolerance = 1e-10
    assert loss == pytest.approx(expected, rel=tolerance)
    torch.testing.assert_close(gradient, wanted, rtol=tolerance, atol=tolerance * float(wanted.abs().max()))


@pytest.mark.parametrize("name", sorted(PAIR_LOSSES))
def test_micro_batches_and_packing_do_not_change_the_gradient(name: str) -> None:
    settings = {"loss_type": name, **SMOOTHED.get(name, {})}
    answers, reference = draw_answers(4), build_model(1)
    loss, wanted, metrics = train_once(settings, cut(answers, 4, packed=False), reference=reference)
    for pairs, packed in [(4, True), *([] if name in SORTED else [(1, False), (2, False), (2, True)])]:
        other, gradient, others = train_once(settings, cut(answers, pairs, packed=packed), reference=reference)
        assert other == pytest.approx(loss, rel=1e-10)
        torch.testing.assert_close(gradient, wanted, rtol=1e-9, atol=1e-10)
        assert others == pytest.approx(metrics, rel=1e-10)


def test_rpo_alpha_is_the_sft_loss_with_that_weight() -> None:
    answers, reference = draw_answers(4), build_model(1)
    batches = cut(answers, 2, packed=True)
    alpha = train_once({"rpo_alpha": 0.7}, batches, reference=reference)
    both = train_once({"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.7]}, batches, reference=reference)
    assert alpha[0] == both[0]
    assert torch.equal(alpha[1], both[1])


def test_the_plain_head_gives_the_same() -> None:
    answers, reference = draw_answers(3), build_model(1)
    batches = cut(answers, 3, packed=True)
    settings = {"rpo_alpha": 0.7, "use_weighting": True}
    loss, wanted, metrics = train_once(settings, batches, reference=reference)
    other, gradient, others = train_once(settings, batches, reference=reference, loss=LossArgs(impl="plain"))
    assert other == pytest.approx(loss, rel=1e-10)
    torch.testing.assert_close(gradient, wanted, rtol=1e-8, atol=1e-10)
    assert others == pytest.approx(metrics, rel=1e-10)


@pytest.mark.parametrize(("name", "expected"), [("sigmoid", math.log(2)), ("hinge", 1.0), ("ipo", 1 / (4 * 0.1**2))])
def test_the_first_loss_where_the_reference_is_the_policy(name: str, expected: float) -> None:
    batches = cut(draw_answers(4), 2, packed=True)
    loss, _, metrics = train_once({"loss_type": name}, batches, reference=build_model(0))
    assert loss == pytest.approx(expected, rel=1e-12)
    assert [metrics[f"rewards/{part}"] for part in ("chosen", "rejected", "margins", "accuracies")] == [0.0] * 4


def test_metrics_are_means_over_the_global_batch() -> None:
    answers, reference, policy = draw_answers(4), build_model(1), build_model(0)
    _, _, metrics = train_once({"beta": 0.2}, cut(answers, 1, packed=False), reference=reference)
    with torch.no_grad():
        values = [compute_token_log_probs(policy, answer) for answer in answers]
        scores = torch.stack([log_probs.sum() for log_probs, _, _ in values])
        others = torch.stack([compute_token_log_probs(reference, answer)[0].sum() for answer in answers])
    chosen, rejected = (0.2 * (scores - others)).view(-1, 2).unbind(1)
    expected = {
        "rewards/chosen": chosen.mean(),
        "rewards/rejected": rejected.mean(),
        "rewards/accuracies": (chosen > rejected).double().mean(),
        "rewards/margins": (chosen - rejected).mean(),
        "logps/chosen": scores[::2].mean(),
        "logps/rejected": scores[1::2].mean(),
        "logits/chosen": torch.cat([logits for _, _, logits in values[::2]]).mean(),
        "logits/rejected": torch.cat([logits for _, _, logits in values[1::2]]).mean(),
        "nll_loss": -torch.cat([log_probs for log_probs, _, _ in values[::2]]).mean(),
    }
    assert metrics == pytest.approx({name: value.item() for name, value in expected.items()}, rel=1e-10)
    assert 0 < metrics["rewards/accuracies"] < 1


def test_pairs_without_labels_count_nothing() -> None:
    answers, reference = draw_answers(4), build_model(1)
    loss, wanted, metrics = train_once({"rpo_alpha": 0.5}, cut(answers, 2, packed=True), reference=reference)
    empty = [Answer(answer.ids, [0.0] * len(answer.ids)) for answer in draw_answers(2, seed=3)]
    batches = cut([*answers[:4], *empty[:2], *answers[4:], *empty], 3, packed=True)
    batches.append(collate(answers[:2]).without_targets())
    other, gradient, others = train_once({"rpo_alpha": 0.5}, batches, reference=reference)
    assert other == pytest.approx(loss, rel=1e-12)
    torch.testing.assert_close(gradient, wanted)
    assert others == pytest.approx(metrics, rel=1e-10)


def test_stored_scores_of_the_reference_are_used() -> None:
    answers, reference = draw_answers(4), build_model(1)
    batches = cut(answers, 2, packed=False)
    on_line = train_once({}, batches, reference=reference)
    stored = AnswerScorer(CHUNKED).score_reference(build_state(build_model(0), reference), batches)
    assert [batch.answer_values["reference"].shape for batch in stored] == [(4,), (4,)]
    ahead = train_once({}, stored)  # without a reference
    assert ahead[0] == on_line[0]
    assert torch.equal(ahead[1], on_line[1])


def test_the_reference_leaves_weights_mode_and_gradients_as_they_are() -> None:
    model = build_model(0)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    train_state = build_state(model, build_model(1))
    for training in (True, False):
        model.train(training)
        (scored,) = AnswerScorer(CHUNKED).score_reference(train_state, cut(draw_answers(2), 2, packed=True))
        assert model.training == training
        assert not scored.answer_values["reference"].requires_grad
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_validation_has_the_metrics_of_all_pairs() -> None:
    answers, reference = draw_answers(5), build_model(1)
    objective: Objective = paired_answers(PreferenceArgs(), CHUNKED)
    loss, _, metrics = train_once({}, cut(answers, 5, packed=False), reference=reference)
    train_state = build_state(build_model(0), reference)
    validated = compute_validation_metrics(train_state, cut(answers, 2, packed=True), objective, max_iters=None)
    assert validated.pop("val_loss") == pytest.approx(loss, rel=1e-10)
    assert validated == pytest.approx({f"val_{name}": value for name, value in metrics.items()}, rel=1e-10)


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_validation_in_mixed_precision_has_rewards(precision: str) -> None:
    objective, batches = paired_answers(PreferenceArgs(), CHUNKED), cut(draw_answers(4), 2, packed=True)

    def validate(name: str) -> float:
        state = build_state(build_model(0).float(), build_model(1).float())
        state = replace(state, precision=PRECISIONS[name])
        return compute_validation_metrics(state, batches, objective, max_iters=None)["val_rewards/margins"]

    expected = validate("32-true")
    assert abs(expected) > 0.05
    assert validate(precision) == pytest.approx(expected, rel=0.1)
