"""The plain loop that this package is compared with trains a causal GPT-2."""

import importlib
import math
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
LAYERS, HEADS, WIDTH, ROWS, BATCH, LENGTH = 2, 2, 16, 50, 3, 8


@pytest.fixture
def speedrun(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script, which imports another one of its folder."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("speedrun")


@pytest.fixture
def model(speedrun: Any) -> Any:
    torch.manual_seed(0)
    return speedrun.build_plain(speedrun.Shape(LAYERS, HEADS, WIDTH, ROWS, BATCH, LENGTH))


def test_an_untrained_model_knows_nothing_and_every_parameter_is_trained(speedrun: Any, model: Any) -> None:
    loss = speedrun.compute_loss(model, torch.randint(ROWS, (BATCH, LENGTH + 1)))
    assert loss.item() == pytest.approx(math.log(ROWS), abs=0.05)
    loss.backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in model.parameters())


def test_a_prediction_depends_on_the_tokens_before_it_only(speedrun: Any, model: Any) -> None:
    inputs = torch.randint(ROWS, (1, LENGTH))
    changed = inputs.clone()
    changed[0, 5] = (inputs[0, 5] + 1) % ROWS
    differs = (speedrun.predict(model, inputs) != speedrun.predict(model, changed)).any(-1)[0]
    assert differs.tolist() == [position >= 5 for position in range(LENGTH)]
