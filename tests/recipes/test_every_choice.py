"""Every setting of an optimizer or a tuner has an effect: another value changes what is trained, how fast, or the sums.

A new setting without a value fails `test_every_setting_of_a_class_has_a_value`.
"""

from typing import Any

import pytest
import torch

from litgpt import adapt
from litgpt.adapt import loftq, quantization
from litgpt.adapt.llama_pro import expand_config
from litgpt.adapt.schedule import TunerSchedule
from litgpt.data.stream.batch import Batch
from litgpt.model.config import Config
from litgpt.model.gpt import GPT
from litgpt.model.init import copy_into, initialize
from litgpt.parallel.precision import PRECISIONS
from litgpt.recipe.keys import list_settings
from litgpt.recipe.optimizer import OPTIMIZERS, SGD, Optimizer
from litgpt.recipe.train import LossArgs
from litgpt.recipe.tuner import TUNERS
from litgpt.train.gradient_init import initialize_from_batches
from litgpt.train.objective import next_token
from litgpt.train.optimizer import build_optimizers
from litgpt.train.train_state import TrainState
from tests.runs import SHAPE

pytestmark = pytest.mark.slow

OPTIMIZER_VALUES: dict[str, dict[str, Any]] = {
    "AdamW": {"lr": 0.3, "betas": (0.5, 0.6), "eps": 0.1, "weight_decay": 0.5, "amsgrad": True, "fused": False},
    "PrecisionAwareAdamW": {
        **{"lr": 0.3, "betas": (0.5, 0.6), "eps": 0.1, "weight_decay": 0.5, "exp_avg_dtype": "bf16"},
        **{"exp_avg_sq_dtype": "fp8", "main_params_dtype": "fp32", "offload_fraction": 0.5},
    },
    "AdamW8bit": {"lr": 0.3, "betas": (0.5, 0.6), "eps": 0.1, "weight_decay": 0.5},
    "SGD": {"lr": 0.3, "momentum": 0.5, "dampening": 0.5, "weight_decay": 0.5, "nesterov": True},
    "Muon": {
        **{"lr": 0.3, "momentum": 0.5, "nesterov": False, "weight_decay": 0.5, "ns_steps": 1},
        **{"adjust_lr_fn": "original", "adamw_lr": 0.2, "adamw_betas": (0.5, 0.6), "adamw_eps": 0.1},
    },
    "GaLore": {
        **{"lr": 0.3, "betas": (0.5, 0.6), "eps": 0.1, "weight_decay": 0.5, "rank": 3, "update_proj_gap": 1},
        **{"scale": 0.5, "proj_type": "full"},
    },
}
OPTIMIZER_BASES: dict[str, dict[str, Any]] = {"SGD": {"momentum": 0.9}, "GaLore": {"rank": 4}}
TUNER_VALUES: dict[str, dict[str, Any]] = {
    "Full": {
        "freeze_parameters": ["embedding"],
        "freeze_parameters_regex": "norm",
        "freeze_parameters_ratio": 0.9,
        "trainable_parameters": ["embedding"],
        "trainable_parameters_regex": "embedding",
    },
    "LISA": {"activated_layers": 1, "step_interval": 1},
    "LLaMAPro": {"new_blocks": 2, "groups": 1},
    "LoRA": {
        **{"r": 3, "alpha": 9, "dropout": 0.5, "target_modules": ["q"], "target_regex": "q_proj|.*\\.k", "bias": "all"},
        **{"modules_to_save": ["norm"], "rslora": True, "dora": True, "init": "gaussian", "lora_plus": 4.0},
        **{"loftq_iterations": 3, "ga_batches": 2, "ga_direction": "ArBr", "ga_scale": "unit", "ga_gamma": 4.0},
    },
    "AdaLoRA": {
        **{
            "target_r": 3,
            "init_r": 6,
            "alpha": 9,
            "dropout": 0.5,
            "tinit": 3,
            "tfinal": 2,
            "delta_t": 3,
            "total_steps": 12,
        },
        **{"beta1": 0.1, "beta2": 0.1, "orth_reg_weight": 3.0, "target_modules": ["q"]},
    },
    "IA3": {"target_modules": ["q", "down"], "feedforward_modules": []},
    "VeRA": {"r": 8, "target_modules": ["q"], "dropout": 0.5, "d_initial": 0.5, "projection_seed": 3},
    "BOFT": {"block_size": 8, "butterfly_factors": 2, "target_modules": ["q"]},
    "FourierFT": {"n_frequency": 9, "scaling": 30.0, "frequency_seed": 3, "init": "zero", "target_modules": ["q"]},
    "Bone": {"r": 4, "variant": "bat", "mini_r": 2, "dropout": 0.5, "target_modules": ["q"]},
    "Adapter": {"prompt_length": 3, "start_layer": 1},
    "AdapterV2": {"prompt_length": 3, "start_layer": 1},
    "ReFT": {"r": 2, "layers": [1], "dropout": 0.5},
}
FREEZES = {"freeze_parameters": ["embedding", "blocks"]}
RANKS, PRUNED = {"init_r": 4, "target_r": 1}, {"init_r": 8, "target_r": 1, "beta1": 0.1, "alpha": 500.0}
GRADIENT = {"init": "lora_ga", "r": 2}
FEW, SHARDS = {"n_frequency": 20}, {"r": 8}
TUNER_BASES: dict[str, dict[str, Any]] = {
    **{"Full trainable_parameters": FREEZES, "Full trainable_parameters_regex": FREEZES},
    "LISA step_interval": {"activated_layers": 1},
    **dict.fromkeys(
        [f"FourierFT {name}" for name in ("n_frequency", "scaling", "frequency_seed", "init", "target_modules")], FEW
    ),
    "LoRA loftq_iterations": {"init": "loftq"},
    **dict.fromkeys([f"LoRA ga_{name}" for name in ("batches", "direction", "scale", "gamma")], GRADIENT),
    **dict.fromkeys([f"AdaLoRA {name}" for name in TUNER_VALUES["AdaLoRA"]], RANKS),
    "AdaLoRA beta2": PRUNED,
    **dict.fromkeys([f"Bone {name}" for name in ("r", "variant", "dropout", "target_modules")], SHARDS),
    "Bone mini_r": {"r": 8, "variant": "mini"},
}


def measure_training(optimizer: Optimizer, tuner: Any = None, dtype: torch.dtype = torch.float32) -> list[Any]:
    """What is trained, how fast, with which arguments, and its sums after some steps."""
    torch.manual_seed(0)
    config = Config(**{**SHAPE, "n_layer": 4, "n_embd": 32, "bias": True})
    model = GPT(expand_config(config, tuner) if tuner else config)
    initialize(model.to(dtype), 0)
    base, init = {name: p.detach().clone() for name, p in model.named_parameters()}, getattr(tuner, "init", None)
    if init == "loftq":
        quantization.quantize(model, "bnb.int8-training")
        quantization.load_quantized(model, base.items())
    if tuner:
        adapt.attach(model, tuner)
        adapt.initialize_adapter(model, tuner, 0)
    if init == "loftq":
        loftq.initialize_loftq(model, tuner, base.items())
    if init == "lora_ga":
        state = TrainState(model, [], torch.device("cpu"), PRECISIONS["32-true"])
        ids = torch.randint(300, (tuner.ga_batches, 2, 16))
        initialize_from_batches(state, next_token(LossArgs()), [Batch(row, row) for row in ids], tuner)
    optimizers = build_optimizers(optimizer, model, tuner)
    schedule = (adapt.build_schedule(model, tuner, 0, steps=6) if tuner else None) or TunerSchedule()
    for step in range(6):
        schedule.begin_step(step)
        model.zero_grad()
        model(torch.arange(16)[None] + step).square().mean().backward()
        schedule.add_gradients(copy_into)
        for one in optimizers:
            one.step()
        schedule.end_step(optimizers, copy_into)
    groups = [group for one in optimizers for group in one.param_groups]
    order = tuner.get_block_order(4) if tuner else None
    trained = {name: p.double().sum().item() for name, p in model.named_parameters() if p.requires_grad}
    on_host = [len(getattr(one, "on_host", ())) for one in optimizers]
    return [trained, [{"fused": group.get("fused"), "peak_lr": group["peak_lr"]} for group in groups], order, on_host]


def test_every_setting_of_a_class_has_a_value() -> None:
    optimizers = {name: list_settings(cls).keys() for name, cls in OPTIMIZERS.items()}
    tuners = {name: list_settings(cls).keys() for name, cls in TUNERS.items()}
    assert optimizers == {name: values.keys() for name, values in OPTIMIZER_VALUES.items()}
    assert tuners == {name: values.keys() for name, values in TUNER_VALUES.items()}


@pytest.mark.parametrize(("cls", "name"), [(cls, name) for cls, values in OPTIMIZER_VALUES.items() for name in values])
def test_a_setting_of_an_optimizer_has_an_effect(cls: str, name: str) -> None:
    if cls == "AdamW8bit":
        pytest.importorskip("bitsandbytes")
    usual = {"lr": 0.1} | OPTIMIZER_BASES.get(cls, {})
    first, second = (OPTIMIZERS[cls](**settings) for settings in (usual, usual | {name: OPTIMIZER_VALUES[cls][name]}))
    dtype = torch.bfloat16 if name == "main_params_dtype" else torch.float32
    assert measure_training(first, dtype=dtype) != measure_training(second, dtype=dtype)


@pytest.mark.parametrize(("cls", "name"), [(cls, name) for cls, values in TUNER_VALUES.items() for name in values])
def test_a_setting_of_a_tuner_has_an_effect(cls: str, name: str) -> None:
    usual = TUNER_BASES.get(f"{cls} {name}", {})
    first, second = (TUNERS[cls](**settings) for settings in (usual, usual | {name: TUNER_VALUES[cls][name]}))
    assert measure_training(SGD(lr=0.1), first) != measure_training(SGD(lr=0.1), second)
