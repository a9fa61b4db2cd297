"""Models with a vision tower train on several ranks as on one, also if a rank, or a step, has no image."""

import pytest

from litgpt.model.gpt import GPT
from litgpt.train import step
from tests.layouts.layouts import Case, Facts, collect_facts, find_deviations, measure_mutation, run_reference

IMAGES = (0, 1, 5)  # of two ranks with two rows in a micro-batch, the second one has none
CASES = [
    Case("vision", 2, {"data_replicate": 2}, images=IMAGES),
    Case("vision", 2, {"data_shard": 2}, images=IMAGES),
    Case("vision", 2, {"data_replicate": 2}, images=IMAGES, tuner="decoder alone"),
    Case("vision", 2, {"data_shard": 2}, images=IMAGES, tuner="projector alone"),
    Case("vision", 2, {"data_replicate": 2}),
]
SLOW = [
    Case("vision", 2, {"data_shard": 2}),
    Case("vision", 2, {"data_replicate": 2}, images=IMAGES, tuner="lora on parts"),
    Case("vision", 2, {"data_shard": 2, "zero": 1}, images=(5,)),
    Case("vision", 4, {"data_replicate": 2, "data_shard": 2}, images=(6,), tuner="lora on parts"),
]


@pytest.mark.parametrize("case", [*CASES, *(pytest.param(case, marks=pytest.mark.slow) for case in SLOW)], ids=str)
def test_layout_trains_as_one_process(case: Case) -> None:
    assert find_deviations(case) == {}


@pytest.mark.parametrize("images", [(), IMAGES], ids=["text", "images"])
def test_what_a_step_trains(images: tuple[int, ...]) -> None:
    facts = run_reference(Case("vision", images=images, tuner="projector alone").single_process)
    assert {name for name in facts["gradient"] if "vision" in name} == (
        {f"vision.projector.linear_{number}.{kind}" for number in (1, 2) for kind in ("weight", "bias")}
        if images
        else set()
    )


def without_images(case: Case) -> Facts:
    """The tower reads nothing."""
    embed = GPT.embed_media
    GPT.embed_media = lambda model, ids, _: embed(model, ids, step.build_empty_media())  # type: ignore[method-assign]
    return collect_facts(case)


@pytest.mark.slow
def test_mutations_are_noticed() -> None:
    case = Case("vision", 2, {"data_replicate": 2}, images=IMAGES)
    assert measure_mutation(without_images, case)["gradient"] > 1e-3
