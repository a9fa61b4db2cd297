"""Finetuning runs with noise on embeddings, and by other ways of training: broken off or not, on one rank or two."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from litgpt.errors import UserError
from litgpt.recipe.finetune import FinetuneFull, FinetuneLora
from litgpt.recipe.parallel import ParallelArgs
from litgpt.recipe.tuner import LISA, AdaLoRA
from tests.commands.test_finetune import LORA, base, run, weights

__all__ = ["base"]
SHORT = {
    "train__max_steps": 6,
    "train__save_interval": None,
    "train__global_batch_size": 4,
    "eval__final_validation": False,
}
LISA_SETTINGS = {"activated_layers": 1, "step_interval": 2}
ADALORA = {"init_r": 4, "target_r": 2, "tinit": 1, "tfinal": 2, "total_steps": 6, "dropout": 0.1}
PAIR, QUANTIZED = {"r": 4, "alpha": 6, "dropout": 0.1}, {"quantize": "bnb.int8-training"}
GALORE = {"lr": 1e-2, "rank": 4, "update_proj_gap": 2, "scale": 0.25, "weight_decay": 0.0}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "noise": ("finetune_lora", {**LORA, "neftune_alpha": 5.0}),
    "LISA": ("finetune_full", {"tuner": {"class_path": "LISA", "init_args": LISA_SETTINGS}}),
    "LLaMAPro": ("finetune_full", {"tuner": {"class_path": "LLaMAPro", "init_args": {"new_blocks": 2}}}),
    "AdaLoRA": ("finetune_lora", {"tuner": {"class_path": "AdaLoRA", "init_args": ADALORA}}),
    "LoftQ": (
        "finetune_lora",
        {"tuner": {"class_path": "LoRA", "init_args": {**PAIR, "init": "loftq", "loftq_iterations": 2}}, **QUANTIZED},
    ),
    "LoRA-GA": ("finetune_lora", {"tuner": {"class_path": "LoRA", "init_args": {**PAIR, "init": "lora_ga"}}}),
    "GaLore": ("finetune_full", {"optimizer": {"class_path": "GaLore", "init_args": GALORE}}),
}
SLOW = dict.fromkeys(("AdaLoRA", "LoftQ", "LoRA-GA"), pytest.mark.slow)


def validation_losses(folder: Path) -> list[float]:
    with (folder / "out/logs/csv/version_0/metrics.csv").open() as file:
        return [float(row["val_loss"]) for row in csv.DictReader(file) if row["val_loss"]]


@pytest.mark.parametrize(
    ("case", "ranks"),
    [pytest.param(case, 1, marks=SLOW.get(case, ())) for case in CASES]
    + [pytest.param(case, 2, marks=pytest.mark.slow) for case in CASES],
)
def test_a_run_broken_off_and_resumed_ends_as_if_it_had_not_been(
    base: Path, tmp_path: Path, case: str, ranks: int
) -> None:
    command, settings = CASES[case]
    settings = {**settings, **SHORT, "train__lr_decay_steps": 6}
    whole = run(tmp_path / "whole", base, command, ranks, **settings)
    run(tmp_path / "broken", base, command, ranks, **{**settings, "train__max_steps": 3})
    second = run(tmp_path / "broken", base, command, ranks, **settings, resume=True)
    assert {step: second[step] for step in (4, 5, 6)} == {step: whole[step] for step in (4, 5, 6)}
    actual, expected = (weights(tmp_path / name / "out" / "final") for name in ("broken", "whole"))
    assert all(torch.equal(actual[key], expected[key]) for key in expected)


def test_noise_changes_training_and_not_validation(base: Path, tmp_path: Path) -> None:
    settings = {**LORA, **SHORT, "train__max_steps": 2, "eval": {"initial_validation": True, "final_validation": False}}
    quiet = run(tmp_path / "quiet", base, **settings)
    noisy = run(tmp_path / "noisy", base, **settings, neftune_alpha=30)
    assert abs(quiet[1] - noisy[1]) > 1e-3
    assert validation_losses(tmp_path / "quiet") == validation_losses(tmp_path / "noisy") != []


def test_blocks_take_turns_alike_on_any_layout(base: Path, tmp_path: Path) -> None:
    command, settings = CASES["LISA"]
    alone = run(tmp_path / "alone", base, command, **settings, **SHORT)
    for name, layout in {"shared": {}, "replicated": {"parallel": {"data_replicate": 2, "data_shard": 1}}}.items():
        assert run(tmp_path / name, base, command, 2, **settings, **SHORT, **layout) == pytest.approx(alone, abs=1e-5)
    before, after = weights(base), weights(tmp_path / "alone" / "out" / "final")
    assert not [name for name in before if torch.equal(before[name], after[name])]


@pytest.mark.slow
@pytest.mark.parametrize("case", ["LoftQ", "LoRA-GA"])
def test_initializations_are_alike_on_any_layout(base: Path, tmp_path: Path, case: str) -> None:
    command, settings = CASES[case]
    tuner = {"class_path": "LoRA", "init_args": {**settings["tuner"]["init_args"], "dropout": 0.0}}
    settings = {**settings, **SHORT, "tuner": tuner, "train__lr_warmup_steps": 1}
    alone = run(tmp_path / "alone", base, command, **settings)
    for name, layout in {"shared": {}, "replicated": {"data_replicate": 2, "data_shard": 1}}.items():
        shared = run(tmp_path / name, base, command, 2, **settings, parallel=layout)
        assert shared == pytest.approx(alone, abs=1e-5), name
    if case == "LoftQ":
        return
    plain = {**settings, "tuner": {"class_path": "LoRA", "init_args": {**PAIR, "dropout": 0.0}}}
    random_start = run(tmp_path / "random", base, command, **plain)
    assert alone[1] == random_start[1] and alone[6] < random_start[6]  # from the base, and faster


@pytest.mark.slow
def test_ranks_are_pruned_alike_on_any_layout(base: Path, tmp_path: Path) -> None:
    command, settings = CASES["AdaLoRA"]
    settings = {"tuner": {"class_path": "AdaLoRA", "init_args": {**ADALORA, "dropout": 0.0}}}
    optimizer = {"class_path": "PrecisionAwareAdamW", "init_args": {"lr": 1e-2, "eps": 1e-5}}
    settings |= {"optimizer": optimizer, **SHORT}
    alone = run(tmp_path / "alone", base, command, **settings)
    assert alone[6] < alone[1]
    layouts = {"shared": {}, "replicated": {"data_replicate": 2, "data_shard": 1}, "split": {"tensor": 2}}
    for name, layout in layouts.items():
        shared = run(tmp_path / name, base, command, 2, **settings, parallel=layout)
        assert shared == pytest.approx(alone, abs=1e-5), name
        actual, expected = (
            load_file(tmp_path / one / "out/adapter/adapter_model.safetensors") for one in (name, "alone")
        )
        values = {key for key in expected if key.endswith("lora_E")}
        assert all(torch.equal(actual[key] == 0, expected[key] == 0) for key in values)
        kept = sum(int(expected[key].ne(0).sum()) for key in values)
        assert kept == 2 * len(values)


def test_moments_of_low_rank_are_alike_on_any_layout_and_small(base: Path, tmp_path: Path) -> None:
    command, settings = CASES["GaLore"]
    alone = run(tmp_path / "alone", base, command, **settings, **SHORT)
    assert alone[6] < alone[1] - 0.3
    assert run(tmp_path / "shared", base, command, 2, **settings, **SHORT) == pytest.approx(alone, abs=1e-5)
    kept = load_file(next((tmp_path / "alone/out/step-00000006").glob("shard-*.safetensors")))
    # gate is (48, 32) in the blocks of this model: brought down to (48, 4)
    shapes = {
        key: list(kept[f"optimizer.{key}.blocks.1.mlp.gate.weight"].shape) for key in ("right", "exp_avg", "exp_avg_sq")
    }
    assert shapes == {"right": [32, 4], "exp_avg": [48, 4], "exp_avg_sq": [48, 4]}


def test_added_blocks_are_trained_alone_and_alike_on_any_layout(base: Path, tmp_path: Path) -> None:
    command, settings = CASES["LLaMAPro"]
    settings = {**settings, **SHORT, "optimizer__init_args__lr": 1e-2}
    plain = run(tmp_path / "plain", base, command, **{**settings, "train__max_steps": 1, "tuner": "Full"})
    alone = run(tmp_path / "alone", base, command, **settings)
    assert alone[1] == plain[1] and alone[6] < alone[1] - 0.1
    assert run(tmp_path / "shared", base, command, 2, **settings) == pytest.approx(alone, abs=1e-5)
    before, after = weights(base), weights(tmp_path / "alone" / "out" / "final")
    assert json.loads((tmp_path / "alone/out/final/config.json").read_text())["num_hidden_layers"] == 4
    own = {name: name.replace("layers.1.", "layers.2.") for name in before}  # 0, its copy, 1, its copy
    assert all(torch.equal(before[name], after[moved]) for name, moved in own.items())
    copies = {
        name: name.replace(f"layers.{number}.", f"layers.{2 * number + 1}.")
        for number in (0, 1)
        for name in before
        if f"layers.{number}." in name
    }
    assert not [name for name, copy in copies.items() if torch.equal(before[name], after[copy])]
    assert after.keys() == {*own.values(), *copies.values()}


def test_splits_that_would_be_wrong_are_refused() -> None:
    for axis in ("tensor", "context", "pipeline"):
        with pytest.raises(UserError, match=f"neftune_alpha: 5 is not supported with parallel.{axis}: 2; set"):
            FinetuneLora(Path("x"), neftune_alpha=5, devices=2, parallel=ParallelArgs(**{axis: 2}))
    with pytest.raises(UserError, match=r"tuner: LISA is not supported with parallel.pipeline: 2; set"):
        FinetuneFull(Path("x"), tuner=LISA(), devices=2, parallel=ParallelArgs(pipeline=2))
    with pytest.raises(UserError, match=r"tuner: AdaLoRA is not supported with parallel.pipeline: 2; set"):
        FinetuneLora(Path("x"), tuner=AdaLoRA(), devices=2, parallel=ParallelArgs(pipeline=2))
    with pytest.raises(UserError, match=r"quantize: bnb.nf4 is not supported with tuner: LISA, which trains the"):
        FinetuneLora(Path("x"), tuner=LISA(), quantize="bnb.nf4")
