"""Blocks take turns: which is a function of seed and step, and those that rest hold no gradients and no moments."""

from collections import Counter

import pytest
import torch

from litgpt import adapt
from litgpt.adapt.lisa import LISASchedule
from litgpt.errors import UserError
from litgpt.model.gpt import GPT
from litgpt.recipe.optimizer import SGD, AdamW, Muon, Optimizer
from litgpt.recipe.tuner import LISA
from litgpt.train.lisa_schedule import turns_of
from litgpt.train.optimizer import build
from tests.adapt.models import IDS, base_of, loss_of
from tests.store.models import random_model, small

SETTINGS = LISA(activated_layers=2, step_interval=3)


def prepared(name: str = "Llama-3.2-1B", settings: LISA = SETTINGS) -> GPT:
    model = random_model(small(name, n_layer=5, tie_embeddings=False))
    adapt.attach(model, settings)
    return model


def test_every_block_is_drawn_alike_often_and_stays_for_its_turn() -> None:
    model = prepared()
    turns = [LISASchedule(model, SETTINGS, seed=1).drawn(step) for step in range(1200)]
    assert all(len(drawn) == 2 and drawn == turns[step // 3 * 3] for step, drawn in enumerate(turns))
    often = Counter(number for drawn in turns[::3] for number in drawn)
    assert all(count == pytest.approx(160, abs=35) for count in often.values()) and len(often) == 5
    assert turns[:60] != [LISASchedule(model, SETTINGS, seed=2).drawn(step) for step in range(60)]


@pytest.mark.parametrize(
    "settings", [AdamW(lr=1e-2), SGD(lr=1e-2, momentum=0.9), Muon(lr=1e-2)], ids=lambda s: type(s).__name__
)
def test_what_is_drawn_is_trained_and_the_rest_holds_nothing(settings: Optimizer) -> None:
    model = prepared()
    optimizers = build(settings, model)
    turns = turns_of(SETTINGS, model, 0, lambda one: one)
    assert turns is not None
    resting, trained_once = set(range(5)), set()
    for step in range(9):
        assert turns.turn_to(step, model, optimizers) is model
        drawn, before = turns.blocks.drawn(step), base_of(model)
        loss_of(model(IDS)).backward()
        for optimizer in optimizers:
            optimizer.step()
        state = {parameter: values for optimizer in optimizers for parameter, values in optimizer.state.items()}
        for name, parameter in model.named_parameters():
            due = not name.startswith("blocks.") or int(name.split(".")[1]) in drawn
            assert (parameter.grad is not None) == due == (parameter in state), name
            assert due != torch.equal(parameter, before[name]), name
            if isinstance(settings, AdamW) and due:
                fresh = name.startswith("blocks.") and int(name.split(".")[1]) in resting
                assert state[parameter]["step"] == 1 if fresh else state[parameter]["step"] > (step > 0), name
            parameter.grad = None
        resting = set(range(5)) - drawn
        trained_once |= drawn
    assert len(trained_once) > 2


def test_a_router_s_correction_is_never_trained() -> None:
    model = random_model(small("Mixtral-8x7B-v0.1", n_expert=4, router_correction=True, sliding_window_size=None))
    adapt.attach(model, LISA(activated_layers=1))
    assert [name for name, one in model.named_parameters() if not one.requires_grad] == [
        f"blocks.{layer}.mlp.router.correction" for layer in range(2)
    ]
    blocks = LISASchedule(model, LISA(activated_layers=1), 0)
    blocks.turn_to(0)
    (drawn,) = blocks.drawn(0)
    assert not any("correction" in name and one.requires_grad for name, one in model.named_parameters())
    assert model.blocks[drawn].mlp.router.weight.requires_grad
    assert not model.blocks[1 - drawn].mlp.router.weight.requires_grad


def test_more_blocks_than_there_are_are_refused() -> None:
    with pytest.raises(UserError, match=r"tuner.activated_layers: 6 of 5 blocks; give at most 5"):
        prepared(settings=LISA(activated_layers=6))
