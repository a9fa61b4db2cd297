"""LISA: which blocks are active is a function of seed and step; frozen ones hold no gradients and no moments."""

from collections import Counter

import pytest
import torch

from litgpt import adapt
from litgpt.adapt.lisa import LISASchedule
from litgpt.errors import UserError
from litgpt.model.gpt import GPT
from litgpt.parallel.precision import PRECISIONS
from litgpt.recipe.optimizer import SGD, AdamW, Muon, Optimizer
from litgpt.recipe.tuner import LISA
from litgpt.train.optimizer import build_optimizers
from litgpt.train.train_state import TrainState
from tests.adapt.models import IDS, compute_loss, copy_base
from tests.store.models import random_model, small

SETTINGS = LISA(activated_layers=2, step_interval=3)


def build_model(name: str = "Llama-3.2-1B", settings: LISA = SETTINGS) -> GPT:
    model = random_model(small(name, n_layer=5, tie_embeddings=False))
    adapt.attach(model, settings)
    return model


def test_every_block_is_drawn_equally_often_and_stays_for_an_interval() -> None:
    model = build_model()
    drawings = [LISASchedule(model, SETTINGS, seed=1).draw_blocks(step) for step in range(1200)]
    assert all(len(drawn) == 2 and drawn == drawings[step // 3 * 3] for step, drawn in enumerate(drawings))
    often = Counter(number for drawn in drawings[::3] for number in drawn)
    assert all(count == pytest.approx(160, abs=35) for count in often.values()) and len(often) == 5
    assert drawings[:60] != [LISASchedule(model, SETTINGS, seed=2).draw_blocks(step) for step in range(60)]


@pytest.mark.parametrize(
    "settings", [AdamW(lr=1e-2), SGD(lr=1e-2, momentum=0.9), Muon(lr=1e-2)], ids=lambda s: type(s).__name__
)
def test_active_blocks_are_trained_and_frozen_ones_hold_no_state(settings: Optimizer) -> None:
    model = build_model()
    optimizers = build_optimizers(settings, model)
    schedule = adapt.build_schedule(model, SETTINGS, 0)
    assert schedule is not None
    schedule.begin_step(0)
    state = TrainState(model, optimizers, torch.device("cpu"), PRECISIONS["32-true"], tuner_schedule=schedule)
    resting, trained_once = set(range(5)), set()
    for step in range(9):
        state.begin_step(step)
        assert state.model is model
        drawn, before = schedule.draw_blocks(step), copy_base(model)
        compute_loss(model(IDS)).backward()
        for optimizer in optimizers:
            optimizer.step()
        moments = {parameter: values for optimizer in optimizers for parameter, values in optimizer.state.items()}
        for name, parameter in model.named_parameters():
            due = not name.startswith("blocks.") or int(name.split(".")[1]) in drawn
            assert (parameter.grad is not None) == due == (parameter in moments), name
            assert due != torch.equal(parameter, before[name]), name
            if isinstance(settings, AdamW) and due:
                fresh = name.startswith("blocks.") and int(name.split(".")[1]) in resting
                assert moments[parameter]["step"] == 1 if fresh else moments[parameter]["step"] > (step > 0), name
            parameter.grad = None
        resting = set(range(5)) - drawn
        trained_once |= drawn
    assert len(trained_once) > 2


def test_a_router_s_correction_is_never_trained() -> None:
    model = random_model(small("Mixtral-8x7B-v0.1", n_expert=4, router_correction=True, sliding_window_size=None))
    adapt.attach(model, LISA(activated_layers=1))
    assert [name for name, parameter in model.named_parameters() if not parameter.requires_grad] == [
        f"blocks.{layer}.mlp.router.correction" for layer in range(2)
    ]
    schedule = LISASchedule(model, LISA(activated_layers=1), 0)
    schedule.begin_step(0)
    (drawn,) = schedule.draw_blocks(0)
    assert not any("correction" in name and parameter.requires_grad for name, parameter in model.named_parameters())
    assert model.blocks[drawn].mlp.router.weight.requires_grad
    assert not model.blocks[1 - drawn].mlp.router.weight.requires_grad


def test_more_active_blocks_than_the_model_has_are_refused() -> None:
    with pytest.raises(UserError, match=r"tuner.activated_layers: 6 of 5 blocks; set at most 5"):
        build_model(settings=LISA(activated_layers=6))
