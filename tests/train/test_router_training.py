"""Runs that train routers: corrections follow the load, survive a resumption, and the load is reported."""

import contextlib
import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from litgpt import cli
from litgpt.errors import UserError
from litgpt.model.config import Config
from litgpt.model.gpt import GPT
from litgpt.model.routing import Routing
from litgpt.recipe.moe import MoEArgs
from litgpt.train.early_checks import check_routing
from litgpt.train.router_training import RouterTrainer, compute_metrics
from tests.runs import SHAPE, read_losses, write_recipe, write_text

EXPERTS: dict[str, Any] = {
    **{"mlp_class_name": "LLaMAMoE", "n_expert": 8, "n_expert_per_token": 2, "moe_intermediate_size": 8},
    **{"router_correction": True, "router_softmax": "before_top_k", "first_k_dense_replace": 1},
}


def build(rate: float) -> RouterTrainer:
    model = GPT(Config(**{**SHAPE, **EXPERTS, "n_layer": 3}))
    return RouterTrainer(MoEArgs(router_bias_update_rate=rate), model, None)


def test_corrections_move_by_the_rate_towards_the_mean() -> None:
    trainer = build(0.5)
    load = torch.tensor([[0.0] * 8, [8, 0, 4, 4, 4, 4, 4, 4], [0, 0, 0, 0, 0, 0, 16, 16]])
    trainer.update_corrections(load.double())
    trainer.update_corrections(load.double())
    first, second = (block.mlp.router.correction for block in trainer.model.blocks[1:])
    assert first.tolist() == [-1, 1, 0, 0, 0, 0, 0, 0]
    assert second.tolist() == [1] * 6 + [-1, -1]


def test_a_skipped_step_leaves_the_corrections() -> None:
    trainer = build(0.5)
    for skipped in (True, False):
        trainer.begin(1, 1.0)
        trainer.passes = [
            Routing(trainer.settings, rows=1, scale=1.0, records=dict.fromkeys((1, 2), torch.arange(12.0)))
        ]
        trainer.finish(torch.device("cpu"), skipped=skipped)
        assert bool(trainer.model.blocks[1].mlp.router.correction.any()) != skipped


def test_metrics_are_relative_to_the_mean_of_their_layer() -> None:
    totals = torch.tensor([[1.0, 3, 0, 4, 2, 6], [2, 2, 1, 4, 4, 0]], dtype=torch.float64)
    metrics = compute_metrics(totals, 2, tokens=4)
    assert metrics == {
        **{"experts/max_load": 1.5, "experts/min_load": 0.5, "experts/dropped": 1 / 8},
        **{"router/entropy": 1.0, "router/aux_loss": 6 / 8, "router/z_loss": 6 / 8},
    }


def pretrain(folder: Path, *flags: str) -> Path:
    folder.mkdir()
    write_text(folder)
    moe = {"aux_loss_coeff": 0.01, "router_bias_update_rate": 0.01, "expert_capacity_factor": 1.0}
    write_recipe(folder, model_config=SHAPE | EXPERTS, moe=moe, train__max_steps=6, train__lr_decay_style="constant")
    with contextlib.chdir(folder):
        assert cli.main(["pretrain", "--config", "recipe.yaml", *flags]) == 0
    return folder


def test_a_run_reports_the_load_and_resumes_to_the_bit(tmp_path: Path) -> None:
    whole = pretrain(tmp_path / "whole")
    part = pretrain(tmp_path / "part", "--train.max_steps", "4")
    with contextlib.chdir(part):
        assert cli.main(["pretrain", "--config", "recipe.yaml", "--resume", "auto"]) == 0
    assert read_losses(part) == read_losses(whole)
    weights, resumed = (load_file(folder / "out/final/model.safetensors") for folder in (whole, part))
    (name,) = [name for name in weights if "correction" in name]
    assert torch.equal(weights[name], resumed[name])
    assert set((weights[name] * 100).round().abs().tolist()) <= set(range(7)) and weights[name].any()
    rows = list(csv.DictReader((whole / "out/logs/csv/version_0/metrics.csv").open()))
    columns = ("experts/max_load", "experts/min_load", "experts/dropped", "router/entropy", "router/aux_loss")
    values = [[float(row[column]) for column in columns] for row in rows if row["loss"]]
    assert len(values) == 6
    for most, least, dropped, entropy, aux_loss in values:
        assert most >= 1 >= least and 0 <= dropped < 1 and 0 < entropy < 2.1 and aux_loss > 0.9
    load = json.loads((whole / "out/expert_load.json").read_text())
    assert (
        list(load) == ["1"]
        and sum(load["1"]) == pytest.approx(8, abs=1e-2)
        and max(load["1"]) == pytest.approx(values[-1][0], abs=1e-3)
    )
    page = (whole / "out/report.html").read_text()
    assert page.count('<td title="layer 1, expert') == 8 and "Load of experts" in page and "Dropped share" in page


CASES: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"aux_loss_coeff": 0.1}, {"n_expert": 0, "mlp_class_name": "LLaMAMLP"}, "no effect with a model without experts"),
    ({"router_bias_update_rate": 0.1}, {"router_correction": False}, "set model_config.router_correction: true"),
    ({"router_load_balancing_type": "sinkhorn"}, {}, "sinkhorn is not supported with the model's router_correction"),
]


@pytest.mark.parametrize(("settings", "shape", "message"), CASES)
def test_settings_without_an_effect_on_the_model(settings: Any, shape: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_routing(MoEArgs(**settings), Config(**{**SHAPE, **EXPERTS, **shape}), adapted=False)


def test_an_adapter_has_no_updates_of_corrections() -> None:
    config = Config(**{**SHAPE, **EXPERTS})
    check_routing(MoEArgs(aux_loss_coeff=0.1), config, adapted=True)
    with pytest.raises(UserError, match="changes the base model, which an adapter leaves"):
        check_routing(MoEArgs(router_bias_update_rate=0.1), config, adapted=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"router_load_balancing_type": "seq_aux_loss"}, "set moe.aux_loss_coeff: 0.001"),
        ({"router_load_balancing_type": "none", "aux_loss_coeff": 0.1}, "set moe.router_load_balancing_type: aux_loss"),
        ({"token_drop_policy": "position"}, "set moe.expert_capacity_factor: 1.25"),
        ({"pad_expert_input_to_capacity": True}, "set moe.expert_capacity_factor: 1.25"),
        ({"expert_capacity_factor": 0.0}, "use a number from 0.001"),
    ],
)
def test_settings_without_an_effect(settings: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        MoEArgs(**settings)
