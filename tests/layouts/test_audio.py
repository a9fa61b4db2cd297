"""Models with an audio tower train on every layout as in one process, also if a rank, or a step, has no sound."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from litgpt.model.gpt import GPT
from litgpt.train import step
from tests.audio_model import write_audio_model, write_sound_rows
from tests.layouts.layouts import Case, Facts, collect_facts, find_deviations, measure_mutation, run_reference
from tests.layouts.pool import POOL
from tests.layouts.test_vision_rows import compute
from tests.omni_model import write_omni_model, write_omni_rows

SOUNDS = (0, 1, 5)  # of two ranks with two rows in a micro-batch, the second one has none
CASES = [
    Case("audio", 2, {"data_replicate": 2}, images=SOUNDS),
    Case("audio", 2, {"data_shard": 2}, images=SOUNDS, tuner="all but the tower"),
]
SLOW = [
    Case("audio", 2, {"data_shard": 2}, images=SOUNDS),
    Case("audio", 2, {"data_replicate": 2}),
    Case("audio", 2, {"data_replicate": 2}, images=(5,), tuner="lora on audio"),
    Case("audio", 2, {"tensor": 2}, images=SOUNDS),
    Case("audio", 2, {"tensor": 2, "sequence": False}, images=SOUNDS, tuner="lora on audio"),
    Case("audio", 2, {"context": 2}, packed=True, images=SOUNDS, micro=1),
    Case("audio", 2, {"pipeline": 2}, images=SOUNDS),
]


@pytest.mark.parametrize("case", [*CASES, *(pytest.param(case, marks=pytest.mark.slow) for case in SLOW)], ids=str)
def test_layout_trains_as_one_process(case: Case) -> None:
    assert find_deviations(case) == {}


@pytest.mark.parametrize("sounds", [(), SOUNDS], ids=["text", "sounds"])
def test_what_a_step_trains(sounds: tuple[int, ...]) -> None:
    facts = run_reference(Case("audio", images=sounds).single_process)
    trained = {name for name in facts["gradient"] if name.startswith("audio.")}
    assert bool(trained) == bool(sounds) and "audio.positions.weight" not in trained


WRITERS = [
    (write_audio_model, write_sound_rows),
    pytest.param(write_omni_model, write_omni_rows, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("write_model", "write_rows"), WRITERS, ids=["sounds", "sounds and images"])
def test_rows_train_as_in_one_process(
    write_model: Callable[[Path], Path], write_rows: Callable[[Path], Path], tmp_path: Path
) -> None:
    write_model(tmp_path / "model")
    write_rows(tmp_path)
    losses, gradients = compute(tmp_path, {})
    assert any(name.startswith("audio.blocks") for name in gradients)
    for other_losses, others in POOL.run(compute, tmp_path, {"data_replicate": 2}, ranks=2):
        assert other_losses == pytest.approx(losses, abs=1e-9) and others.keys() == gradients.keys()
        for name, gradient in others.items():
            torch.testing.assert_close(gradient, gradients[name], atol=1e-9, rtol=1e-7, msg=name)


def without_sounds(case: Case) -> Facts:
    """The tower reads nothing."""
    embed = GPT.embed_media
    GPT.embed_media = lambda model, ids, *_: embed(model, ids, step.build_empty_media())  # type: ignore[method-assign]
    return collect_facts(case)


@pytest.mark.slow
@pytest.mark.parametrize(("mutation", "layout"), [(without_sounds, {"data_replicate": 2})])
def test_mutations_are_noticed(mutation: Callable[[Case], Facts], layout: dict[str, Any]) -> None:
    assert measure_mutation(mutation, Case("audio", 2, layout, images=SOUNDS))["gradient"] > 1e-3
