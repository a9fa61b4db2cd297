"""The losses of prediction layers against a loop over tokens in float64."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from litgpt.data.stream.batch import IGNORE, Batch
from litgpt.model.gpt import GPT, PredictionBlock
from litgpt.model.init import initialize
from litgpt.recipe.train import LossArgs
from litgpt.train.local_batch import build_local_batch
from litgpt.train.objective import Objective, next_token
from tests.layouts.layouts import SHAPES, build_global_batch

WEIGHT = 0.3
CONFIG = SHAPES["predictions"]


def build_model() -> GPT:
    model = GPT(CONFIG).double()
    initialize(model, 1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".norm" in name:
                parameter.add_(torch.linspace(-0.3, 0.3, parameter.numel(), dtype=torch.float64))
    return model


def run_layer(model: GPT, block: PredictionBlock, hidden_TD: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The output of a prediction layer for a document, and the logits; ids are the tokens that it embeds."""
    pair = torch.cat([block.norm_embedding(model.embedding(ids)), block.norm_hidden(hidden_TD)], -1)
    inputs = model._build_inputs(ids[None], None, None, None, None)
    hidden_TD = block.norm_output(super(PredictionBlock, block).forward(block.projection(pair)[None], inputs))[0]
    return hidden_TD, model.head(hidden_TD)  # type: ignore[misc]


def compute_reference(model: GPT, batch: Batch) -> list[tuple[Tensor, Tensor, int]]:
    """For each layer: the weighted sum of losses, the sum without weights, and their number, document by document.

    A layer has no inputs for the last tokens of a document, so every document is cut there.
    """
    results = []
    for number in (1, 2):
        weighted, plain, count = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64), 0
        for row in range(len(batch.ids)):
            documents = torch.zeros_like(batch.ids[row]) if batch.documents is None else batch.documents[row]
            for document in documents.unique():
                if document < 0:
                    continue
                tokens = (documents == document).nonzero()[:, 0]
                ids, labels = batch.ids[row, tokens], batch.labels[row, tokens]
                hidden = model.norm(model.run_blocks(range(2), model.embedding(ids)[None], inputs_of(model, ids)))[0]
                for depth in range(1, number + 1):
                    hidden, logits = run_layer(
                        model, model.prediction_blocks[depth - 1], hidden[: len(ids) - depth], ids[depth:]
                    )
                for token in range(len(ids) - number):
                    label = labels[token + number]
                    if label == IGNORE:
                        continue
                    loss = -logits[token].log_softmax(-1)[label]
                    factor = 1.0 if batch.weights is None else batch.weights[row, tokens[token + number]].double()
                    weighted, plain, count = weighted + factor * loss, plain + loss.detach(), count + 1
        results.append((weighted, plain, count))
    return results


def inputs_of(model: GPT, ids: Tensor) -> Any:
    return model._build_inputs(ids[None], None, None, None, None)


def compute(model: GPT, batch: Batch, objective: Objective) -> tuple[Tensor, Tensor | None]:
    return objective.loss(model, build_local_batch(objective.weigh(batch), CONFIG, None))


def gradients(model: GPT, loss: Tensor) -> list[Tensor]:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [torch.zeros(()) if g is None else g for g in torch.autograd.grad(loss, parameters, allow_unused=True)]


@pytest.mark.parametrize(
    ("packed", "weighted", "settings"),
    [
        (True, True, LossArgs(prediction_weight=WEIGHT)),
        (False, False, LossArgs(prediction_weight=WEIGHT, impl="plain")),
        (True, False, LossArgs(prediction_weight=WEIGHT, normalize="sample")),
    ],
    ids=["packed and weighted", "rows", "per sample"],
)
def test_losses_and_gradients_equal_a_loop_over_documents(packed: bool, weighted: bool, settings: LossArgs) -> None:
    model, whole = build_model(), build_global_batch(packed=packed)
    fields = {name: value[:3] for name, value in vars(whole).items() if value is not None}
    batch = Batch(**fields)
    if weighted:
        draw = torch.Generator().manual_seed(4)
        batch = replace(batch, weights=torch.rand(batch.ids.shape, generator=draw))
    objective = next_token(settings, prediction_layers=2)
    (loss,), metrics = compute(model, batch, objective)
    (main,), _ = compute(model, batch, next_token(settings))
    assert loss.item() == pytest.approx(main.item(), rel=1e-12)  # the reported loss is that of the next tokens
    reference = compute_reference(model, objective.weigh(batch))
    assert metrics is not None
    for layer, (_, plain, count) in enumerate(reference):
        assert metrics[:, layer].tolist() == pytest.approx([plain.item(), count], rel=1e-8)
        assert count > 0
    expected = main + WEIGHT * sum(weighted for weighted, _, _ in reference) / 2
    for actual, own in zip(gradients(model, loss), gradients(model, expected), strict=True):
        torch.testing.assert_close(actual, own, rtol=1e-8, atol=1e-12)


def test_each_metric_is_a_mean_over_its_own_labels() -> None:
    objective = next_token(LossArgs(), ["chat"], prediction_layers=2)
    assert objective.metrics == ("loss_chat", "prediction_loss/1", "prediction_loss/2")
    ids = torch.arange(6).view(1, 6)
    batch = Batch(ids, ids + 1, documents=torch.tensor([[0, 0, 0, 0, 1, 1]]))
    later = objective.weigh(batch).later_tokens
    assert later is not None
    labels = [[[2, 3, 4, IGNORE, 6, IGNORE]], [[3, 4, IGNORE, IGNORE, IGNORE, IGNORE]]]
    assert later["labels"].tolist() == labels
    assert later["ids"].tolist() == [[[1, 2, 3, 0, 5, 0]], [[2, 3, 0, 0, 0, 0]]]
    (loss,), metrics = compute(build_model(), replace(batch, ids=ids, labels=ids + 1), objective)
    assert metrics is not None
    assert metrics.shape == (2, 3) and metrics[1].tolist() == [0, 4, 2] and loss > 0


@pytest.mark.parametrize("layers", [0, 1, 2])
def test_a_model_runs_the_layers_that_are_given(layers: int) -> None:
    model, ids = build_model(), torch.arange(6).view(1, 6)
    shapes = model(ids, head=lambda hidden, *_: hidden.shape, predictions=[(ids, lambda x, *_: x.shape)] * layers)
    assert shapes == ([(1, 6, 32)] * (1 + layers) if layers else (1, 6, 32))
