"""The warnings of a run before its first step."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from litgpt.errors import UserError
from litgpt.model.config import Config
from litgpt.recipe.pretrain import Pretrain
from litgpt.recipe.train import EvalArgs, TrainArgs
from litgpt.recipe.tuner import LoRA
from litgpt.train.header import describe_data
from litgpt.train.run_spec import RunSpec
from litgpt.train.setup import create_version, list_warnings
from tests.runs import SHAPE

EXPERTS = {"mlp_class_name": "LLaMAMoE", "n_expert": 4, "n_expert_per_token": 2, "moe_intermediate_size": 8}


@pytest.mark.parametrize(
    ("settings", "shape", "warnings"),
    [
        ({}, {}, []),
        ({"tuner": LoRA(bias="all")}, {"bias": True}, []),
        ({"tuner": LoRA(bias="all")}, {}, ["tuner.bias: all has no effect with a model without biases; set none"]),
        (
            {"train": TrainArgs(lr_warmup_steps=31)},
            {},
            [
                "train.lr_warmup_steps: 31 is more than the 30 steps of the run, so the learning rate rises to the "
                "end; set at most 3"
            ],
        ),
        (
            {"eval": EvalArgs(initial_validation=True)},
            {},
            ["eval.initial_validation: true has no effect without validation data; set false"],
        ),
        (
            {},
            EXPERTS | {"router_correction": True},
            [
                "moe.router_bias_update_rate: 0 leaves the model's router_correction at its values; set 0.001 to "
                "balance the load of experts by it"
            ],
        ),
    ],
)
def test_warnings_before_the_first_step(settings: dict[str, Any], shape: dict[str, Any], warnings: list[str]) -> None:
    tuner = settings.pop("tuner", None)
    recipe = Pretrain("x", **{"train": TrainArgs(lr_warmup_steps=30)} | settings)
    spec: Any = RunSpec("pretrain", Config(**{**SHAPE, **shape}), None, None, None, tuner=tuner)  # type: ignore[arg-type]
    data: Any = SimpleNamespace(validation=None)
    fabric: Any = SimpleNamespace(world_size=1, device=torch.device("cpu"))
    assert list_warnings(recipe, spec, data, 30, fabric) == warnings
    stream: Any = SimpleNamespace(samples_per_epoch=240)
    header = str(describe_data(recipe, (stream, None), length=32, steps=30, warmup=30))
    assert ("warm-up" in header) != any("warmup" in line for line in warnings)  # said once


def test_each_version_has_a_folder_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "version_7").mkdir()
    assert [create_version(tmp_path).name for _ in range(2)] == ["version_8", "version_9"]
    Pretrain("x", add_version=True, resume=Path("out/step-00000002"))
    for resume in (True, "auto"):
        with pytest.raises(UserError, match=r"add_version: true and resume: .* are mutually exclusive"):
            Pretrain("x", add_version=True, resume=resume)  # type: ignore[arg-type]
