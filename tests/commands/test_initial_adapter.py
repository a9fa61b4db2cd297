"""Runs that begin with an adapter of an earlier one: alike on any layout, broken off or not, and for its own base."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from litgpt.errors import UserError
from litgpt.recipe.finetune import FinetuneLora
from litgpt.recipe.tuner import IA3
from tests.commands.test_finetune import base, recipe_of, run, weights, write_base, write_rows
from tests.commands.test_tuned_runs import SHORT, validation_losses
from tests.processes import join_ranks, run_litgpt, start_ranks

__all__ = ["base"]
PISSA = {"r": 4, "alpha": 6, "dropout": 0.0, "init": "pissa", "rslora": True, "modules_to_save": ["norm"]}
TUNERS: dict[str, Any] = {
    "LoRA": {"class_path": "LoRA", "init_args": PISSA},
    "VeRA": {"class_path": "VeRA", "init_args": {"r": 4}},
    "AdapterV2": {"class_path": "AdapterV2", "init_args": {"start_layer": 0}},
    "AdaLoRA": {"class_path": "AdaLoRA", "init_args": {"init_r": 4, "target_r": 2, "dropout": 0.0}},
    "FourierFT": {"class_path": "FourierFT", "init_args": {"n_frequency": 50}},
    "Bone": {"class_path": "Bone", "init_args": {"r": 8, "variant": "bat"}},
    "LoftQ": {"class_path": "LoRA", "init_args": {"r": 4, "dropout": 0.0, "init": "loftq", "loftq_iterations": 2}},
}
FIRST = {**SHORT, "train__max_steps": 4, "eval": {"interval": 100, "final_validation": True}}
SECOND = {**SHORT, "train__lr_decay_steps": 6, "eval": {"initial_validation": True, "final_validation": False}}


@pytest.fixture(scope="module")
def first(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The adapter of a first run."""
    folder = tmp_path_factory.mktemp("first")
    run(folder, base, **FIRST, tuner=TUNERS["LoRA"])
    return folder / "out" / "adapter"


SLOW = [pytest.param(name, "adapter", marks=pytest.mark.slow) for name in ("AdaLoRA", "FourierFT", "Bone", "LoftQ")]


@pytest.mark.parametrize(("tuner", "where"), [("LoRA", "."), ("VeRA", "adapter"), ("AdapterV2", "final"), *SLOW])
def test_a_second_run_begins_where_the_first_one_ended(base: Path, tmp_path: Path, tuner: str, where: str) -> None:
    base_settings = {"quantize": "bnb.int8-training"} if tuner == "LoftQ" else {}
    run(tmp_path / "first", base, **FIRST, **base_settings, tuner=TUNERS[tuner])
    begun = tmp_path / "first" / "out" / where  # a run, its adapter, or what cannot be folded in
    run(tmp_path / "second", base, **SECOND, **base_settings, initial_adapter_dir=str(begun))
    assert validation_losses(tmp_path / "second") == pytest.approx(validation_losses(tmp_path / "first"), abs=1e-6)
    name = "final" if tuner == "AdapterV2" else "adapter"
    before, after = (load_file(tmp_path / one / f"out/{name}/adapter_model.safetensors") for one in ("first", "second"))
    assert before.keys() == after.keys() and not all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize(
    "layout", [{}, *(pytest.param({axis: 2}, marks=pytest.mark.slow) for axis in ("tensor", "pipeline"))], ids=str
)
def test_two_ranks_begin_alike(base: Path, first: Path, tmp_path: Path, layout: dict[str, int]) -> None:
    settings = {**SECOND, "initial_adapter_dir": str(first)}
    alone = run(tmp_path / "alone", base, **settings)
    shared = run(tmp_path / "shared", base, ranks=2, **settings, parallel=layout)
    assert shared == pytest.approx(alone, abs=1e-5) and len(set(alone.values())) == len(alone)
    actual, expected = (weights(tmp_path / name / "out" / "final") for name in ("shared", "alone"))
    assert all(torch.allclose(actual[key], expected[key], atol=1e-4) for key in expected)


def test_a_second_run_is_resumed_to_the_bit(base: Path, first: Path, tmp_path: Path) -> None:
    settings = {**SECOND, "initial_adapter_dir": str(first)}
    whole = run(tmp_path / "whole", base, **settings)
    run(tmp_path / "broken", base, **{**settings, "train__max_steps": 3})
    rest = run(tmp_path / "broken", base, **settings, resume=True)
    assert {step: rest[step] for step in (4, 5, 6)} == {step: whole[step] for step in (4, 5, 6)}
    actual, expected = (weights(tmp_path / name / "out" / "final") for name in ("broken", "whole"))
    assert all(torch.equal(actual[key], expected[key]) for key in expected)


def test_settings_beside_those_of_the_adapter_are_refused() -> None:
    for key, settings in {"tuner": {"tuner": IA3()}, "lora_r": {"lora_r": 4}}.items():
        with pytest.raises(
            UserError, match=f"{key}: not supported with initial_adapter_dir, which has its own settings"
        ):
            FinetuneLora(Path("x"), initial_adapter_dir=Path("y"), **settings)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"initial_adapter_dir": "BASE"}, "holds no adapter; give a folder with adapter_config.json"),
        ({"initial_adapter_dir": "nowhere/at/all"}, "initial_adapter_dir: nowhere/at/all is not a folder"),
        ({"checkpoint_dir": "FIRST"}, "train it further with litgpt finetune BASE --initial_adapter_dir ADAPTER"),
        ({"initial_adapter_dir": "FIRST", "lora_alpha": 3}, "lora_alpha: not supported with initial_adapter_dir"),
        (
            {"initial_adapter_dir": "FIRST", "freeze": {"vision": False}},
            "freeze.vision: false has no effect with initial_adapter_dir; leave it out; the adapter has its own parts",
        ),
    ],
)
def test_what_cannot_be_begun_with_is_said_in_one_line(
    base: Path, first: Path, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    places = {"BASE": str(base), "FIRST": str(first)}
    write_rows(tmp_path)
    recipe_of(tmp_path, base, **{key: places.get(str(value), value) for key, value in changes.items()})
    assert join_ranks(start_ranks(run_litgpt, "finetune", "--config", "recipe.yaml", folder=tmp_path)) != [0]
    said = (tmp_path / "rank-0.log").read_text().strip().splitlines()
    assert words in said[-1] and not any("Traceback" in line for line in said)


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"n_layer": 1}, "layers.1."), ({"intermediate_size": 40}, "the model's blocks.0.mlp")],
    ids=str,
)
def test_an_adapter_for_another_model_is_refused(
    first: Path, tmp_path: Path, changes: dict[str, int], words: str
) -> None:
    write_rows(tmp_path)
    recipe_of(tmp_path, write_base(tmp_path, **changes), initial_adapter_dir=str(first))
    assert join_ranks(start_ranks(run_litgpt, "finetune", "--config", "recipe.yaml", folder=tmp_path)) != [0]
    said = (tmp_path / "rank-0.log").read_text().strip().splitlines()
    assert all(part in said[-1] for part in (words, f"initial_adapter_dir: {first}")) and not any(
        "Traceback" in line for line in said
    ), said[-1]
    assert not (tmp_path / "out").exists()
