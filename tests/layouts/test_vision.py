"""Models with a vision tower train on every layout as in one process, also if a rank, or a step, has no image."""

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from litgpt.errors import UserError
from litgpt.model.gpt import GPT
from litgpt.parallel import tensor
from litgpt.parallel.model_sizes import check_model_sizes
from litgpt.recipe.parallel import ParallelArgs
from litgpt.train import step
from tests.layouts.layouts import SHAPES, Case, Facts, collect_facts, find_deviations, measure_mutation, run_reference

IMAGES = (0, 1, 5)  # of two ranks with two rows in a micro-batch, the second one has none
CASES = [
    Case("vision", 2, {"data_replicate": 2}, images=IMAGES),
    Case("vision", 2, {"data_shard": 2}, images=IMAGES),
    Case("vision", 2, {"data_replicate": 2}, images=IMAGES, tuner="decoder alone"),
    Case("vision", 2, {"data_shard": 2}, images=IMAGES, tuner="projector alone"),
    Case("vision", 2, {"data_replicate": 2}),
    Case("vision", 2, {"pipeline": 2}, images=(5,), tuner="projector alone"),
    Case("sections", 2, {"context": 2, "context_method": "ring"}, images=IMAGES, micro=1),
]
SLOW = [
    Case("vision", 2, {"tensor": 2}, images=IMAGES),
    Case("vision", 2, {"tensor": 2, "sequence": False}, images=IMAGES, tuner="lora on parts"),
    Case("vision", 2, {"tensor": 2}, images=IMAGES, tuner="lora on parts", quantize="bnb.nf4"),
    Case("sections", 4, {"tensor": 2, "data_shard": 2}, images=(0,)),
    Case("vision", 2, {"context": 2}, packed=True, images=(1,), micro=1, tuner="projector alone"),
    Case("sections", 2, {"context": 2, "context_method": "ulysses"}, packed=True, images=IMAGES, micro=1),
    Case("vision", 4, {"context": 2, "tensor": 2}, images=IMAGES, tuner="lora on parts"),
    Case("sections", 2, {"pipeline": 2, "pipeline_schedule": "zbv"}, images=IMAGES),
    Case("sections", 2, {"pipeline": 2, "pipeline_schedule": "interleaved"}, images=(5,), tuner="lora on parts"),
    Case("vision", 4, {"pipeline": 2, "data_shard": 2, "zero": 3}, images=(6,)),
    Case("vision", 4, {"pipeline": 2, "data_replicate": 2}, images=IMAGES, tuner="decoder alone"),
    Case("image blocks", 2, {"context": 2}, images=IMAGES),
    Case("image blocks", 2, {"context": 2, "context_method": "ulysses"}, packed=True, images=IMAGES, micro=1),
    Case("image blocks", 4, {"tensor": 2, "pipeline": 2}, images=IMAGES),
    Case("prompt blocks", 2, {"context": 2}, packed=True, images=IMAGES),
    Case("prompt blocks", 2, {"pipeline": 2}, images=IMAGES),
    Case("sections", 8, {"pipeline": 2, "context": 2, "tensor": 2}, images=IMAGES),
    Case("vision", 2, {"data_shard": 2}),
    Case("vision", 2, {"data_replicate": 2}, images=IMAGES, tuner="lora on parts"),
    Case("vision", 2, {"data_shard": 2, "zero": 1}, images=(5,)),
    Case("vision", 4, {"data_replicate": 2, "data_shard": 2}, images=(6,), tuner="lora on parts"),
]


@pytest.mark.parametrize("case", [*CASES, *(pytest.param(case, marks=pytest.mark.slow) for case in SLOW)], ids=str)
def test_layout_trains_as_one_process(case: Case) -> None:
    assert find_deviations(case) == {}


REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "image blocks": ({"context": 2, "context_method": "ring"}, "attend to later ones; set all-gather"),
    "prompt blocks": ({"context": 2, "context_method": "ring"}, "attend to later ones; set all-gather"),
    "deep": (
        {"pipeline": 2, "pipeline_layers": [1, 3]},
        "the first stage has 1 layers, but features of images are added after the first 2; give it 2 or more",
    ),
}


@pytest.mark.parametrize("shape", REFUSALS)
def test_layouts_that_cannot_work_are_refused(shape: str) -> None:
    layout, message = REFUSALS[shape]
    sections = SHAPES["sections"]
    deep = replace(sections, vision={**(sections.vision or {}), "deep_layers": [0, 1]})
    config, settings = {**SHAPES, "deep": deep}[shape], ParallelArgs(**layout)
    with pytest.raises(UserError, match=re.escape(message)):
        check_model_sizes(settings, settings.resolve_dims(2), config, config.n_layer)


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
    GPT.embed_media = lambda model, ids, *_: embed(model, ids, step.build_empty_media())  # type: ignore[method-assign]
    return collect_facts(case)


def with_gradients_of_own_tokens(case: Case) -> Facts:
    """The gradients of features are not summed over the ranks that share a row."""
    tensor.copy_to_group = lambda x, _: x
    return collect_facts(case)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mutation", "layout"), [(without_images, {"data_replicate": 2}), (with_gradients_of_own_tokens, {"tensor": 2})]
)
def test_mutations_are_noticed(mutation: Callable[[Case], Facts], layout: dict[str, Any]) -> None:
    assert measure_mutation(mutation, Case("vision", 2, layout, images=IMAGES))["gradient"] > 1e-3
